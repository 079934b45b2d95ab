"""From semantic operators to aten: each operator's body, traced once per shape, takes its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ir import StepGraph
from ..ops import ROW_SUMS
from ..prims import BODIES
from .backend import inductor_decompositions
from .core import graph_pass
from .trace import Decompositions, insert


@graph_pass(stage="lower")
def shortcut_row_sums(step: StepGraph) -> None:
    """``column_sum(unfold_rows(x))`` -> ``patch_sum(x)``; ``column_sum(one_hot_rows(i))`` -> ``histogram(i)``."""
    left = list(step.graph.nodes)
    while left:
        node = left.pop()
        rows = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(rows, fx.Node) and (shortcut := ROW_SUMS.get((node.target, rows.target))) is not None:
            before = node.prev
            with step.graph.inserting_before(node):
                replacement = insert(step.graph, shortcut, *rows.args, label=node.meta.get("mkor_fx", ""))
            left += _between(before, node)  # rows of rows
            node.replace_all_uses_with(replacement)
    step.graph.eliminate_dead_code()


@functools.cache
def lowering_table(inductor: bool) -> Decompositions:
    """The bodies of ``mkor_fx::`` operators; with ``inductor`` whatever Inductor wants decomposed, too.

    A graph that goes through AOTAutograd afterwards needs the bodies only. One that has been through it already must
    not show Inductor an operator of its decomposition table.
    """
    return {**(inductor_decompositions() if inductor else {}), **BODIES}


def _call(target: Callable, args: tuple, kwargs: dict) -> Any:
    return target(*args, **kwargs)


@graph_pass(stage="lower")
def expand(step: StepGraph, *, inductor: bool = False) -> None:
    """Replace each operator of the lowering table by its body, traced once per shape."""
    table = lowering_table(inductor)
    for node in list(step.graph.nodes):
        if node.op != "call_function" or node.target not in table or not node.users:
            continue
        with step.graph.inserting_before(node):
            label = node.meta.get("mkor_fx", "")
            before = node.prev
            new = insert(step.graph, _call, node.target, node.args, node.kwargs, decompositions=table, label=label)
        written = _between(before, node)
        if any(copy.target is node.target for copy in written):  # the table has it, but declines these operands
            continue
        for copy in written:
            copy.meta = {**{k: v for k, v in node.meta.items() if k in INHERITED}, **copy.meta}
        if isinstance(new, fx.Node):
            node.replace_all_uses_with(new)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(new[user.args[1]])
    step.graph.eliminate_dead_code()


@graph_pass(stage="lower", exact=True)
def store_scalars(step: StepGraph) -> None:
    """``mul(x, s)`` -> ``mul(x, as_strided(s, [], []))`` for every computed scalar ``s`` that a larger tensor's op reads.

    Inductor writes what ``as_strided`` reads. Otherwise it computes bias corrections, norms' quotients and the like again
    for every element, powers and roots in float64 among them.
    """
    for node in list(step.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() or not node.all_input_nodes:
            continue
        wide = [user for user in node.users if isinstance(v := user.meta.get("val"), torch.Tensor) and v.dim()]
        if not wide:
            continue
        with step.graph.inserting_after(node):
            copy = step.graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))
        copy.meta = {key: node.meta[key] for key in ("val", "mkor_fx", *INHERITED) if key in node.meta}
        for user in wide:
            user.replace_input_with(node, copy)


#: what a node's replacement takes over from it
INHERITED = ("partitioner_tag", "stack_trace", "seq_nr", "nn_module_stack", "fwd_nn_module_stack", "recompute")


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes
