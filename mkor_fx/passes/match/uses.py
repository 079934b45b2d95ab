"""The uses of a weight: the products that make up its gradient, or those of a Kronecker product that it is a factor of."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ... import reasons
from ...ir import INPUTS_LAST, Decline, Operand, Tap, fake_value, same_sizes
from ...ops import CASTS, VIEWS
from ...ops.rows import as_columns, as_rows, seen
from ...ops.table import behind
from .boxes import Box, at_dimensions, merge, view_of
from .pieces import PlacedTap, on_whole, pieces, read_product, viewed, where

aten = torch.ops.aten


def read_uses(
    grad: fx.Node, shape: tuple[int, ...], backward: Collection[fx.Node], of_data: Collection[fx.Node] = ()
) -> list[PlacedTap] | Decline:
    """The products that make up a gradient, all turned to see the weight as the same matrices. ``of_data`` are nodes that no
    weight can be a function of."""
    uses: list[PlacedTap] = []
    for piece in pieces(grad, Box.whole(shape)):
        contraction = read_contraction(piece.node, backward, of_data)
        if contraction is None:
            taps = [read_product(piece.node, backward)]
        else:
            taps = contraction.taps(backward, of_data) or [Decline(reasons.KRONECKER, *where(piece.node))]
        for tap in taps:
            use = tap if isinstance(tap, Decline) else place(tap, piece.box, shape)
            if isinstance(use, Decline):
                return use
            uses.append(use)
    if not uses:
        return Decline(reasons.ZERO, *where(grad))
    ways = [{use.whole: use for use in reversed(read.readings())} for read in uses]
    shared = [whole for whole in (use.whole for use in uses[0].readings()) if all(whole in way for way in ways)]
    if not shared:
        return Decline(reasons.DIFFERENT, *where(uses[-1].tap.node))
    if view_of(*shared[0]) is None:
        return Decline(reasons.INCOMPLETE, *where(uses[-1].tap.node))
    return [way[shared[0]] for way in ways]


def place(tap: Tap, box: Box, shape: tuple[int, ...]) -> PlacedTap | Decline:
    """A tap on the piece ``box`` of a parameter of ``shape``."""
    view = box.reshape(tap.matrix)
    if view is None:
        return Decline(reasons.NO_MATRIX.format(made=tap.matrix), *where(tap.node))
    (outer, first), (inner, last) = (at_dimensions(side, shape) for side in view.dims[-2:])
    members = merge((*view.pinned, *outer, *inner, *(view.dims[0] if tap.batched else ())))
    return PlacedTap(tap, members, first, last)


class Contraction(NamedTuple):
    """``node``, the gradient of a factor of ``W = A x B``: ``grad_A[i, j] = s sum_kl G[i k, j l] B[k, l]``, likewise of
    ``B``.

    ``G`` is the gradient of ``W``, ``other`` the other factor, broadcast, and ``scales`` the numbers that make up ``s``.
    ``kept``: 0 for the gradient of ``A``, 1 for that of ``B``.
    """

    node: fx.Node
    G: fx.Node
    scales: tuple[fx.Node | float, ...]
    other: fx.Node
    sizes: tuple[int, int, int, int]
    kept: int

    def taps(self, backward: Collection[fx.Node], of_data: Collection[fx.Node]) -> list[Tap]:
        """The uses of this factor, one for each of ``W``; none where those are no products of rows.

        As in ``T = X B^T, Y = s A T``: the inputs of ``A`` are ``T``, the output gradients of ``B`` are ``s A^T dY``. Every
        row of ``W`` is as many rows of ``A`` as ``B`` has outputs, and as many of ``B`` as ``A`` has inputs.
        """
        i, k, j, l = self.sizes  # noqa: E741
        whole = Box.whole((i * k, j * l))
        whole_gradient = fake_value(self.G).shape == (i * k, j * l)
        uses = read_uses(self.G, (i * k, j * l), backward, of_data) if whole_gradient else None
        if not isinstance(uses, list):
            return []
        uses = [use if use.whole == ((), *whole.dims) else use.flipped() for use in uses]
        taps = [on_whole(use) for use in uses if use.whole == ((), *whole.dims)]
        plain = len(taps) == len(uses) and all(tap.count is None and not tap.lookup for tap in taps)
        return [self._of_factor(tap) for tap in taps] if plain else []

    def _of_factor(self, tap: Tap) -> Tap:
        i, k, j, l = self.sizes  # noqa: E741
        inputs_last = tap.inputs == INPUTS_LAST
        onto_last = inputs_last == (self.kept == 0)  # A sees inputs, and B output gradients, behind the other factor

        def rows(of: Operand, sizes: tuple[int, int], multiplied: bool, scaled: bool, transposed: bool) -> Operand:
            other, scales = self.other if multiplied else None, self.scales if scaled else ()
            return Operand(of.node, kronecker_rows, (viewed(of), sizes, self.kept, other, transposed, scales))

        first = rows(tap.rows_first, (i, k), not onto_last, inputs_last, True)
        last = rows(tap.rows_last, (j, l), onto_last, not inputs_last, False)
        return Tap(self.node, "kronecker", (k, l) if self.kept else (i, j), first, last, tap.inputs)


def read_contraction(
    node: fx.Node, backward: Collection[fx.Node], of_data: Collection[fx.Node]
) -> Contraction | None:
    """How a node contracts the gradient of a Kronecker product with one of its factors, None where it does not. What the
    batch is part of is no factor: a weight of one number, times the batch, looks alike."""
    inner = behind(node.args[0], CASTS) if node.target is aten.sum.dim_IntList else node
    if inner.target is not aten.mul.Tensor or fake_value(inner).dim() != 4:
        return None
    seen, other = sorted(inner.args, key=lambda arg: arg not in backward)
    if not isinstance(other, fx.Node) or other in backward or other in of_data:
        return None
    shape, summed = fake_value(inner).shape, {d % 4 for d in node.args[1]}
    single = {d for d in range(4) if same_sizes(shape[d : d + 1], (1,))}
    for kept, dims in enumerate(({1, 3}, {0, 2})):
        broadcast = [n if d in dims else 1 for d, n in enumerate(shape)]
        if dims - single == summed - single and same_sizes(fake_value(other).shape, broadcast):
            i, k, j, l = shape  # noqa: E741
            return Contraction(node, *_unscaled(seen, (i * k, j * l)), other, (i, k, j, l), kept)
    return None


def _unscaled(node: fx.Node, shape: tuple[int, int]) -> tuple[fx.Node, tuple[fx.Node | float, ...]]:
    """The tensor of ``shape`` of which ``node`` is a view and a multiple, and the numbers that it was multiplied with."""
    scales: list[fx.Node | float] = []
    while node.op == "call_function":
        numbers = [arg for arg in node.args if _is_number(arg)] if node.target is aten.mul.Tensor else []
        if len(numbers) == 1:
            scales += numbers
            node = next(arg for arg in node.args if arg is not numbers[0])
        elif node.target in CASTS or (node.target in VIEWS and fake_value(node).shape != shape):
            node = node.args[0]
        else:
            break
    return node, tuple(scales)


def _is_number(arg: object) -> bool:
    value = fake_value(arg) if isinstance(arg, fx.Node) else arg
    return not isinstance(value, Tensor) or value.dim() == 0


def kronecker_rows(
    x: Tensor,
    viewed: tuple,
    sizes: tuple[int, int],
    kept: int,
    other: Tensor | None,
    transposed: bool,
    scales: tuple[Tensor | float, ...],
) -> Tensor:
    """Rows ``[N, sizes[0] * sizes[1]]`` as rows of one of the two sizes, scaled and multiplied with the ``other`` factor."""
    rows_NSK = seen(x, viewed).unflatten(-1, sizes).movedim(1 + kept, -1)
    for scale in scales:
        rows_NSK = rows_NSK * scale
    if other is not None:
        factor = other.squeeze((0, 2) if kept == 0 else (1, 3))
        rows_NSK = (factor.t() if transposed else factor) @ rows_NSK
    return rows_NSK.flatten(0, 1)


def together(taps: list[Tap]) -> list[list[Tap]]:
    """Uses to be summed in one go: an unrolled recurrence has one each time step, and a few kernels each would be many."""
    groups: dict[object, list[Tap]] = {}
    for i, tap in enumerate(taps):
        plain = tap.count is None and {tap.a.view, tap.g.view} <= {as_rows, as_columns}
        groups.setdefault((tap.inputs, fake_value(tap.g.node).dtype) if plain else i, []).append(tap)
    return list(groups.values())
