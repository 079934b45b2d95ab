"""What the reference records: for every use of a weight, its rows ``a`` and ``g``, known from how the layer is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: uses of weights in the order in which their gradients arrive; None while a program runs without a reference
_tape: list[Use] | None = None


@dataclass(frozen=True)
class Matrix:
    """A weight as its use sees it: ``view`` it, permute it to ``(batch, first, last)`` dimensions, flatten each."""

    view: tuple[int, ...]
    batch: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    def of(self, weight: Tensor) -> Tensor:
        """``[P, Q]``, or ``[E, P, Q]`` for a batch of matrices."""
        permuted = weight.reshape(self.view).permute(*self.batch, *self.first, *self.last)
        return permuted.reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        groups = [self.first, self.last] if not self.batch else [self.batch, self.first, self.last]
        return tuple(torch.Size(self.view[d] for d in dims).numel() for dims in groups)

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        dims = (*self.batch, *self.first, *self.last)
        permuted = matrix.reshape([self.view[d] for d in dims])
        return permuted.permute([dims.index(d) for d in range(len(dims))]).reshape(shape)


@dataclass
class Use:
    """One use: ``kind`` for the list of supported ones; rows ``a``, ``g`` are ``[N, .]`` (``[E, N, .]``), None if opaque.

    ``inputs`` is "last" for ``[O, I]`` matrices, "first" for ``[I, O]``. ``exact``: ``sum g^T a`` is the gradient itself,
    and not the gradient of an effective weight that is computed from this one.
    """

    weight: Tensor
    kind: str
    matrix: Matrix | None = None
    inputs: str = "last"
    a: Tensor | None = None
    g: Tensor | None = None
    exact: bool = True


class recording:
    """``with recording() as tape:`` fills ``tape`` with the uses whose gradients arrive inside."""

    def __enter__(self) -> list[Use]:
        global _tape
        _tape = []
        return _tape

    def __exit__(self, *error: object) -> None:
        global _tape
        _tape = None


def is_recording() -> bool:
    return _tape is not None


def flat(x: Tensor) -> Tensor:
    """``[*, M] -> [N, M]``"""
    return x.reshape(-1, x.shape[-1])


def saw(
    y: Tensor,
    weight: nn.Parameter,
    x: Tensor,
    kind: str,
    *,
    inputs: str = "last",
    a: Callable[[Tensor], Tensor] = flat,
    g: Callable[[Tensor], Tensor] = flat,
    view: Sequence[int] | None = None,
    dims: tuple[tuple, tuple, tuple] | None = None,
    within: tuple[slice, slice] | None = None,
    exact: bool = True,
) -> Tensor:
    """Returns ``y``; on tape, notes that ``y`` came from ``x`` and ``weight``.

    ``within`` are the rows and columns of the matrix that this use has read; the rest of its rows are zeros.
    """
    if _tape is None:
        return y
    tape, held = _tape, x.detach().clone()
    view = tuple(weight.shape if view is None else view)
    matrix = Matrix(view, *(dims or ((), (0,), tuple(range(1, len(view))))))

    def note(grad: Tensor) -> None:
        rows_a, rows_g = a(held), g(grad.detach().clone())
        if within is not None:
            along = dict(zip(("last", "first"), within[::-1])), dict(zip(("last", "first"), matrix.shape[-2:][::-1]))
            rows_a = _within(rows_a, along[0][inputs], along[1][inputs])
            outputs = "first" if inputs == "last" else "last"
            rows_g = _within(rows_g, along[0][outputs], along[1][outputs])
        tape.append(Use(weight, kind, matrix, inputs, rows_a, rows_g, exact))

    if y.requires_grad:
        y.register_hook(note)
    return y.clone()  # a hook on a view is lost where its base is changed in place


def opaque(weight: nn.Parameter, kind: str = "elementwise") -> None:
    """On tape, notes a use that is no product."""
    if _tape is not None:
        _tape.append(Use(weight, kind))


def _within(rows: Tensor, columns: slice, width: int) -> Tensor:
    wide = rows.new_zeros(*rows.shape[:-1], width)
    wide[..., columns] = rows
    return wide


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """``[B, C, *spatial] -> [N, C, *kernel]``: what a convolution without padding multiplies with its weight."""
    n = len(kernel)
    for d in range(n):
        x = x.unfold(2 + d, (kernel[d] - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]
    return x.movedim(1, 1 + n).flatten(0, n)


def positions(y: Tensor) -> Tensor:
    """``[B, C, *spatial] -> [N, C]``"""
    return flat(y.movedim(1, -1))


def by_group(rows: Tensor, groups: int) -> Tensor:
    """``[N, C, *] -> [G, N, C / G * *]``, or ``[N, C * *]`` without groups."""
    split = rows.unflatten(1, (groups, -1)).movedim(1, 0).flatten(2)
    return split if groups > 1 else split[0]


def one_hot(ids: Tensor, size: int, dtype: torch.dtype, padding: int | None = None) -> Tensor:
    ids = ids.flatten()
    return F.one_hot(ids if padding is None else ids[ids != padding], size).to(dtype)
