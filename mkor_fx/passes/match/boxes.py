"""Where a tensor's elements lie in a parameter: layout algebra over views, transposes and slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...ir import View, product


@dataclass(frozen=True)
class Axis:
    """``size`` steps of ``stride`` elements through a parameter: those from ``start`` on, of ``full`` that there are."""

    size: int
    stride: int
    start: int
    full: int

    @property
    def partial(self) -> bool:
        return self.size != self.full

    @property
    def whole(self) -> Axis:
        return Axis(self.full, self.stride, 0, self.full)

    def split(self, outer: int) -> tuple[Axis, Axis] | None:
        """As ``outer`` times the rest; None where that does not come out even."""
        inner, rest = divmod(self.size, outer)
        if rest or self.start % inner or self.full % inner:
            return None
        return Axis(outer, self.stride * inner, self.start // inner, self.full // inner), Axis(
            inner, self.stride, 0, inner
        )


Side = tuple[Axis, ...]


def merge(axes: Iterable[Axis]) -> Side:
    """The same elements in the same order with the fewest axes."""
    merged: list[Axis] = []
    for axis in axes:
        if axis.full == 1:
            continue
        outer = merged[-1] if merged else None
        if outer is not None and not axis.partial and outer.stride == axis.stride * axis.size:
            n = axis.size
            merged[-1] = Axis(outer.size * n, axis.stride, outer.start * n, outer.full * n)
        else:
            merged.append(axis)
    return tuple(merged)


def wholes(side: Side) -> Side:
    """The side of the whole parameter that this one is a piece of."""
    return merge(axis.whole for axis in side)


@dataclass(frozen=True)
class Box:
    """A tensor that is a piece of a parameter: the axes of each dimension, outermost first.

    ``pinned`` are axes of which it holds one element and shows none. Methods return None where the result is no box.
    """

    dims: tuple[Side, ...]
    pinned: Side = ()

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        dims, stride = [], product(shape)
        for size in shape:
            stride //= size
            dims.append(merge([Axis(size, stride, 0, size)]))
        return cls(tuple(dims))

    def reshape(self, shape: Sequence[int]) -> Box | None:
        if [product(axis.size for axis in dim) for dim in self.dims] == list(shape):
            return self
        axes = [axis for dim in self.dims for axis in dim]
        pinned = [axis for axis in axes if axis.size == 1]
        left = list(merge(axis for axis in axes if axis.size > 1))[::-1]
        dims = []
        for size in shape:
            dim: list[Axis] = []
            need = size
            while need > 1 and left:
                axis = left.pop()
                if axis.size > need:
                    halves = axis.split(need)
                    if halves is None:
                        return None
                    axis, inner = halves
                    left.append(inner)
                if need % axis.size:
                    return None
                dim.append(axis)
                need //= axis.size
            if need != 1:
                return None
            dims.append(merge(dim))
        return None if left else Box(tuple(dims), (*self.pinned, *pinned))

    def permute(self, order: Sequence[int]) -> Box:
        return replace(self, dims=tuple(self.dims[i] for i in order))

    def narrow(self, dim: int, start: int, size: int) -> Box | None:
        """The ``size`` elements of a dimension from ``start`` on."""
        if not self.dims[dim]:
            return self if size == 1 else None
        outer, *rest = self.dims[dim]
        inner = product([axis.size for axis in rest])
        if start % inner or size % inner:
            return None
        piece = replace(outer, size=size // inner, start=outer.start + start // inner)
        return replace(self, dims=(*self.dims[:dim], (piece, *rest), *self.dims[dim + 1 :]))


def at_dimensions(side: Side, shape: Sequence[int]) -> tuple[Side, Side]:
    """``(pinned, side)``: a piece that is one index of a dimension in front of a matrix is a member, not rows of one."""
    strides = {product(shape[d + 1 :]) for d in range(len(shape) - 2)}
    pinned, rest = [], []
    for axis in side:
        one = axis.split(1) if axis.partial and axis.size * axis.stride in strides else None
        pinned += [] if one is None else [one[0]]
        rest.append(axis if one is None else one[1])
    return tuple(pinned), merge(rest)


def view_of(members: Side, first: Side, last: Side) -> View | None:
    """How to see a parameter as matrices with these sides, or None if they are not all of it."""
    axes = [*members, *first, *last]
    order = sorted(range(len(axes)), key=lambda i: -axes[i].stride)
    stride = 1
    for i in reversed(order):
        if axes[i].stride != stride:
            return None
        stride *= axes[i].full
    matrix = tuple(product([axis.full for axis in side]) for side in (first, last))
    batch = product([axis.full for axis in members])
    return View(
        split=tuple(axes[i].full for i in order),
        order=tuple(order.index(i) for i in range(len(axes))),
        matrix=(batch, *matrix) if members else matrix,
    )
