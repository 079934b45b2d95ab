"""What is drawn, counted or scaled alike for many weights is computed once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ...ir import StepGraph
from ..core import graph_pass
from ..order.collectives import is_start, is_wait


@graph_pass(stage="lower", exact=True)
def share(step: StepGraph) -> None:
    """One node in the place of all that compute the same small thing: the hash behind random signs, which is that of every
    weight of as many rows, and scalars. Two collectives stay two: what they are given may be equal on one rank alone.
    Inductor does not look for equal nodes in a graph that is not partitioned."""
    first: dict[Hashable, fx.Node] = {}
    for node in list(step.graph.nodes):
        if is_start(node) or is_wait(node):
            continue
        if not node.all_input_nodes or "mkor_fx_alone" in node.meta or not _is_small(node):
            continue
        same = first.setdefault(_spelled(node), node)
        if same is not node:
            node.replace_all_uses_with(same)
            step.graph.erase_node(node)


def _is_small(node: fx.Node) -> bool:
    """Whether it is the library's own, and a scalar, whole numbers or made of whole numbers alone."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor) or "mkor_fx" not in node.meta:
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return not value.dim() or not _is_float(value) or not any(_is_float(n.meta.get("val")) for n in node.all_input_nodes)


def _is_float(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def _spelled(node: fx.Node) -> tuple[Any, ...]:
    """Equal for nodes of equal operator and arguments, whose types count. Constants go by what they hold: each reader has
    its own, which costs nothing where it is written out."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    constant = [isinstance(leaf, fx.Node) and leaf.op == "call_function" and not leaf.all_input_nodes for leaf in leaves]
    spelled = (
        _spelled(leaf) if fixed else leaf if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf))
        for leaf, fixed in zip(leaves, constant)
    )
    return (node.target, spec, node.meta.get("partitioner_tag"), *spelled)
