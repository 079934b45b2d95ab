"""From a gradient back to the products that make it: the uses of one weight, as taps on the whole of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import fx

from ... import reasons
from ...ir import INPUTS_FIRST, INPUTS_LAST, Decline, Operand, Tap, fake_value, product, same_sizes, source_line
from ...ops import CASTS, TABLE, VIEWS
from ...ops.rows import (
    as_columns,
    as_rows,
    count_all,
    count_live,
    gathered_rows,
    only_member,
    placed_count,
    placed_rows,
    where_live,
)
from .boxes import Box, Side, merge, wholes
from .spell_transposes import swaps_last_two

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """A node whose elements are gradients of the piece ``box`` of a parameter."""

    node: fx.Node
    box: Box


@dataclass(frozen=True)
class PlacedTap:
    """A tap on one piece of a parameter: where its members, its ``P`` and its ``Q`` lie in there."""

    tap: Tap
    members: Side
    first: Side
    last: Side

    def flipped(self) -> PlacedTap:
        return PlacedTap(self.tap.flipped(), self.members, self.last, self.first)

    def readings(self) -> list[PlacedTap]:
        """The ways in which this use can see the parameter, the usual one first: outermost dimension first, and one row
        (or column) as a piece of a matrix rather than as a member."""
        found = [self]
        if self.members and not self.tap.batched:
            found += [
                PlacedTap(self.tap, (), merge((*self.members, *self.first)), self.last),
                PlacedTap(self.tap, (), self.first, merge((*self.members, *self.last))),
            ]
        if self.first and self.last and self.last[0].stride > self.first[0].stride:
            return [use.flipped() for use in found] + found
        return found + [use.flipped() for use in found]

    @property
    def whole(self) -> tuple[Side, Side, Side]:
        """The sides of the whole parameter."""
        members, first, last = map(wholes, self.sides)
        return members, first, last

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        return self.members, self.first, self.last

    @property
    def outputs(self) -> Side:
        return self.first if self.tap.inputs == INPUTS_LAST else self.last

    @property
    def partial(self) -> bool:
        return any(axis.partial for side in self.sides for axis in side)


def pieces(node: fx.Node, box: Box) -> list[Piece]:
    """What a gradient is put together from: terms of sums, and parts of concatenations and of scatters into zeros.

    Looks through casts, views and transposes. ``box`` is the whole parameter at first.
    """
    found, stack = [], [Piece(node, box)]
    while stack:
        piece = stack.pop()
        inside = _inside(piece.node, piece.box)
        if inside is None:
            found.append(piece)
        else:
            stack += reversed(inside)
    return found


def _inside(node: fx.Node, box: Box) -> list[Piece] | None:
    """The pieces that an operation only moves or puts together, None for one that makes something new."""
    if _is_zero(node):
        return []
    if node.target in CASTS:
        return [Piece(node.args[0], box)]
    if node.target in VIEWS:
        inner = box.reshape(fake_value(node.args[0]).shape)
        return None if inner is None else [Piece(node.args[0], inner)]
    if node.target is aten.permute.default:
        order = [d % len(box.dims) for d in node.args[1]]
        return [Piece(node.args[0], box.permute([order.index(d) for d in range(len(order))]))]
    if node.target is aten.transpose.int:
        order = list(range(len(box.dims)))
        first, second = (d % len(order) for d in node.args[1:])
        order[first], order[second] = second, first
        return [Piece(node.args[0], box.permute(order))]
    if node.target is aten.add.Tensor and not node.kwargs:
        terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
        same = len(terms) == 2 and all(fake_value(arg).shape == fake_value(node).shape for arg in terms)
        return [Piece(term, box) for term in terms] if same else None
    if node.target is aten.cat.default:
        dim, start, found = (*node.args, 0)[1] % len(box.dims), 0, []
        for part in node.args[0]:
            size = fake_value(part).shape[dim]
            found.append((part, box.narrow(dim, start, size)))
            start += size
    elif node.target is aten.slice_scatter.default and _is_zero(node.args[0]):
        _, part, dim, start, _, step = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
        size = fake_value(node).shape[dim]
        start = 0 if start is None else start + size if start < 0 else start
        found = [(part, box.narrow(dim, start, fake_value(part).shape[dim]) if step == 1 else None)]
    elif node.target is aten.select_scatter.default and _is_zero(node.args[0]):
        _, part, dim, index = node.args
        one = box.narrow(dim, index % fake_value(node).shape[dim], 1)
        found = [(part, one and one.reshape(fake_value(part).shape))]
    else:
        return None
    return None if any(inner is None for _, inner in found) else [Piece(part, inner) for part, inner in found]


def _is_zero(node: fx.Node) -> bool:
    return node.target is aten.full.default and node.args[1] == 0


def read_product(node: fx.Node, backward: Collection[fx.Node]) -> Tap | Decline:
    """Read the product that makes a piece of a parameter off its op table row, and which operand is which."""
    output = None
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        node, output = node.args
    row = TABLE.get(str(node.target))
    if row is None or row.output != output:
        return Decline(reasons.NO_ROW, *where(node))
    tap = row.read(node)
    if isinstance(tap, Decline):
        return replace(tap, op=where(node)[0], source=where(node)[1])
    tap = assign_roles(tap, backward)
    return tap if isinstance(tap, Decline) else replace(tap, bias_grads=tap.bias_grads | row_sums(tap))


def assign_roles(tap: Tap, backward: Collection[fx.Node]) -> Tap | Decline:
    """``g`` depends on the loss gradient, ``a`` does not: says which is which, and checks what a row has said."""
    depends = (tap.rows_first.node in backward, tap.rows_last.node in backward)
    inputs = {(True, False): INPUTS_LAST, (False, True): INPUTS_FIRST}.get(depends)
    if inputs is None or tap.inputs not in (None, inputs):
        which = "both operands depend" if all(depends) else "the operands do not depend as expected"
        return Decline(reasons.ROLES.format(which=which), *where(tap.node))
    return replace(tap, inputs=inputs)


def on_whole(use: PlacedTap) -> Tap:
    """The tap with rows of the whole parameter: zero where this use has no part, and where a row was routed elsewhere."""
    tap = use.tap
    if tap.routed:
        g = tap.g
        first, last = (
            o if o is g else Operand(o.node, where_live, (viewed(o), g.node, viewed(g)))
            for o in (tap.rows_first, tap.rows_last)
        )
        tap = replace(tap, rows_first=first, rows_last=last, count=Operand(g.node, count_live, (viewed(g),)))
    if not use.partial:
        return tap
    members, *sides = ([n for axis in side for n in (axis.size, axis.start, axis.full)] for side in use.sides)
    count = tap.count
    if members:
        count = count or Operand(tap.g.node, count_all, (viewed(tap.g),))
        count = Operand(count.node, placed_count, (viewed(count), members))
    first, last = (
        Operand(o.node, placed_rows, (viewed(o), members, side))
        for o, side in zip((tap.rows_first, tap.rows_last), sides)
    )
    matrix = tuple(product(axis.full for axis in side) for side in (use.sides if members else use.sides[1:]))
    return replace(tap, matrix=matrix, rows_first=first, rows_last=last, count=count)


def viewed(operand: Operand) -> tuple:
    return operand.view, *operand.arguments


# ---- biases ---------------------------------------------------------------------------------------------------------


def row_sums(tap: Tap) -> frozenset[fx.Node]:
    """Nodes that sum the rows of ``g``: gradients of a bias that was added to what this use has made."""
    node, view, batched = tap.g.node, tap.g.view, tap.batched
    if view not in (as_rows, as_columns, only_member, gathered_rows):
        return frozenset()
    if as_columns in (view, *tap.g.arguments):
        if not swaps_last_two(node):
            return frozenset()
        node = node.args[0]
    gathered = tap.node.args[1] if view is gathered_rows else None
    members = batched and gathered is None

    def same_rows(inner: fx.Node, outer: fx.Node) -> bool:
        """Whether ``outer`` is a view or cast of ``inner`` that keeps its columns, and its members."""
        if outer.target in CASTS:
            return True
        before, after = fake_value(inner).shape, fake_value(outer).shape
        same = same_sizes(before[-1:], after[-1:]) and (not members or same_sizes(before[:1], after[:1]))
        return outer.target in VIEWS and len(before) > 0 and len(after) > 0 and same

    while node.target in CASTS | VIEWS and same_rows(node.args[0], node):
        node = node.args[0]
    found, stack = set(), [node]
    shape = fake_value(node).shape
    single = same_sizes(shape[1 if members else 0 : -1], [1] * (len(shape) - (2 if members else 1)))
    while stack:
        here = stack.pop()
        if single and gathered is None:
            found.add(here)
        for user in here.users:
            routed_alike = user.target is aten.index_put.default and user.args[1] == gathered
            if routed_alike or (user.target is aten.sum.dim_IntList and _sums_rows(user, members)):
                found.add(user)
            elif user.op == "call_function" and user.args[:1] == (here,) and same_rows(here, user):
                stack.append(user)
    return frozenset(found)


def _sums_rows(node: fx.Node, members: bool) -> bool:
    rank = fake_value(node.args[0]).dim()
    return {d % rank for d in node.args[1]} == set(range(1 if members else 0, rank - 1))


def where(node: fx.Node) -> tuple[str, str]:
    """The operator of a node and the user's source line."""
    if getattr(node.target, "__name__", "") == "getitem":
        node = node.args[0]
    return str(node.target), source_line(node)
