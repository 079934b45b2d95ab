"""From semantic operators to aten: each operator's body, traced once per shape, takes its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ...ir import StepGraph
from ...prims import ALONE, BODIES, STACKED
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code, inductor_decompositions
from ..torch_api.tracing import Decompositions, insert
from .stack import stack

#: what a node's replacement takes over from it
INHERITED = ("partitioner_tag", "stack_trace", "seq_nr", "nn_module_stack", "fwd_nn_module_stack", "recompute",
             "mkor_fx_alone")  # fmt: skip


@functools.cache
def lowering_table(inductor: bool, kept: Collection[torch._ops.OpOverload] = frozenset()) -> Decompositions:
    """The bodies of ``mkor_fx::`` operators but for those ``kept``; with ``inductor`` whatever Inductor wants
    decomposed, too.

    A graph that goes through AOTAutograd afterwards needs the bodies only. One that has been through it already must
    not show Inductor an operator of its decomposition table.
    """
    bodies = {target: body for target, body in BODIES.items() if target not in kept}
    return {**(inductor_decompositions() if inductor else {}), **bodies}


def _call(target: Callable, args: tuple, kwargs: dict) -> Any:
    return target(*args, **kwargs)


@graph_pass(stage="lower")
def expand(step: StepGraph, *, inductor: bool = False, stacked: bool = False) -> None:
    """Replace each operator of the lowering table by its body, traced once per shape; last those that stay together.

    ``stacked``: what such operators compute of small matrices is computed for several weights at once.
    """
    together = lowering_table(inductor, frozenset(ALONE | STACKED))
    _expand(step, together.keys(), together)
    if stacked:
        _expand(step, ALONE, lowering_table(inductor, frozenset(STACKED)))
        stack(step.graph)
    _expand(step, ALONE | STACKED, lowering_table(inductor))
    eliminate_dead_code(step.graph)


def _expand(step: StepGraph, targets: Collection[Any], table: Decompositions) -> None:
    for node in list(step.graph.nodes):
        if node.op != "call_function" or node.target not in targets or not node.users:
            continue
        with step.graph.inserting_before(node):
            label = node.meta.get("mkor_fx", "")
            before = node.prev
            new = insert(step.graph, _call, node.target, node.args, node.kwargs, decompositions=table, label=label)
        written = between(before, node)
        if any(copy.target is node.target for copy in written):  # the table has it, but declines these operands
            continue
        take_place(node, written, new)
        part = node.name if node.target in ALONE else None
        for copy in written:
            if copy.target in STACKED:  # stands between two parts of the rest
                part = f"{part}, behind {copy.name}"
            elif part is not None:
                copy.meta["mkor_fx_alone"] = part


def take_place(node: fx.Node, written: list[fx.Node], new: Any) -> None:
    """What was ``written`` for a node inherits from it; ``new``, its result or a sequence of them, is read in its place."""
    for copy in written:
        copy.meta = {**{k: v for k, v in node.meta.items() if k in INHERITED}, **copy.meta}
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new)
        return
    for user in list(node.users):
        user.replace_all_uses_with(new[user.args[1]])


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes
