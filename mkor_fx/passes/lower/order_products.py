"""The cheapest order of a direction's products: factors multiply the gradient, or the rows that it is made of."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ...ir import StepGraph, fake_value
from ...prims import precondition
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code
from ..torch_api.tracing import insert

aten = torch.ops.aten


class Factors(NamedTuple):
    """A gradient ``first @ last``, ``[O, N] @ [N, I]``, or the transpose of that if ``turned``, in ``dtype`` (None: its
    own)."""

    first: fx.Node
    last: fx.Node
    product: fx.Node
    turned: bool = False
    dtype: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``O, N, I``"""
        (p, n), q = fake_value(self.first).shape, fake_value(self.last).shape[1]
        return (q, n, p) if self.turned else (p, n, q)


@graph_pass(stage="lower")
def order_products(step: StepGraph) -> None:
    """``left @ (x @ y) @ right`` -> ``(left @ x) @ (y @ right)``, or one side of it, where that takes fewer multiply-adds.

    That is so for fewer rows than a layer is wide, of a gradient that is made by one product of this program and is
    neither reduced nor clipped nor accumulated. It is made all the same where its size is asked for.
    """
    for node in step.graph.find_nodes(op="call_function", target=precondition):
        left, grad, right = node.args
        found = _factors(grad)
        if found is None or not all(isinstance(size, int) for size in found.sizes):
            continue
        early = _cheapest(found.sizes, left is not None, right is not None, kept=_used_otherwise(found.product, node))
        if early == (False, False):
            continue
        with step.graph.inserting_before(node):
            new = insert(
                step.graph, _ordered, left, found.first, found.last, right, *early, found.turned, found.dtype,
                label=node.meta.get("mkor_fx", ""),
            )  # fmt: skip
        node.replace_all_uses_with(new)
    eliminate_dead_code(step.graph)


def _ordered(
    left: Tensor | None, first: Tensor, last: Tensor, right: Tensor | None, left_early: bool, right_early: bool,
    turned: bool, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    x, y = (last.mT, first.mT) if turned else (first, last)
    x, y = (t if dtype is None else t.to(dtype) for t in (x, y))
    x = precondition(left, x, None) if left_early else x
    y = precondition(None, y, right) if right_early else y
    left, right = None if left_early else left, None if right_early else right
    return x @ y if left is None and right is None else precondition(left, x @ y, right)


def _factors(node: fx.Node) -> Factors | None:
    """What a node was multiplied from, through views of the whole matrix."""
    turned, dtype = False, None
    while True:
        target, args = node.target, node.args
        if target is aten.mm.default:
            return Factors(args[0], args[1], node, turned, dtype)  # type: ignore[arg-type]
        if not args or not isinstance(args[0], fx.Node):
            return None
        value, source = fake_value(node), fake_value(args[0])
        if target is aten._to_copy.default and set(node.kwargs) == {"dtype"} and dtype is None:
            dtype = value.dtype
        elif target is aten.transpose.int or (target is aten.permute.default and [*args[1]] == [1, 0]):  # type: ignore[misc]
            turned = not turned
        elif not (target in (aten.view.default, aten.permute.default) and value.shape == source.shape):
            return None
        node = args[0]


def _used_otherwise(product: fx.Node, by: fx.Node) -> bool:
    """Whether anything but ``by`` needs a product."""
    node = product
    while len(node.users) == 1:
        (node,) = node.users
        if node is by:
            return False
    return True


def _cheapest(sizes: tuple[int, int, int], left: bool, right: bool, *, kept: bool) -> tuple[bool, bool]:
    """Whether each side multiplies its operand, by multiply-adds; ``kept``: the product is made anyway. Of equal ones the
    first, product first."""
    o, n, i = sizes

    def multiply_adds(early: tuple[bool, bool]) -> int:
        on_left = left * (n * o * o if early[0] else o * o * i)
        on_right = right * (n * i * i if early[1] else o * i * i)
        return on_left + on_right + n * o * i * (any(early) or not kept)

    return min(itertools.product(*((False, True)[: 1 + side] for side in (left, right))), key=multiply_adds)
