"""In which order things happen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..ir import StepGraph
from .collectives import in_line
from .core import graph_pass
from .match import downstream

aten = torch.ops.aten
#: policies of a (selective) checkpoint that drop the value
RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


@graph_pass(stage="schedule", exact=True)
def recompute_checkpoints(step: StepGraph) -> None:
    """Honour activation checkpointing in a graph that is never partitioned.

    Forward nodes inside a checkpoint (``meta["recompute"]``) that backward nodes read are cloned in front of their first
    backward reader. Random values are kept, not drawn again: their mask is all that a checkpointed dropout saves.
    """
    tagged = {n for n in step.graph.nodes if n.op == "call_function" and n.meta.get("recompute") in RECOMPUTE}
    backward = downstream(step.seeds)
    order = {node: i for i, node in enumerate(step.graph.nodes)}
    readers = [n for n in step.graph.nodes if n not in tagged and (n in backward or _is_backward(n))]
    clones: dict[fx.Node, fx.Node] = {}

    def again(node: fx.Node, before: fx.Node) -> fx.Node:
        if node not in tagged or _is_random(node) or order[node] > order[before]:
            return node
        if node not in clones:
            arguments = {arg: again(arg, before) for arg in node.all_input_nodes}
            with step.graph.inserting_before(before):
                clones[node] = step.graph.node_copy(node, lambda n: arguments[n])
        return clones[node]

    for reader in readers:
        if reader.op == "call_function":
            reader.args, reader.kwargs = fx.map_arg((reader.args, reader.kwargs), lambda n, r=reader: again(n, r))
    for node in step.graph.nodes:  # done: torch has a pass of its own that obeys the tags, and refuses random ops
        node.meta.pop("recompute", None)


def _is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def _is_random(node: fx.Node) -> bool:
    """Draws random numbers, or belongs to an op that does (``getitem`` of ``native_dropout``)."""
    target = node.args[0].target if getattr(node.target, "__name__", "") == "getitem" else node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


@graph_pass(stage="schedule", exact=True)
def update_when_ready(step: StepGraph) -> None:
    """Move what the rewrite has written up to where its last operand is made, keeping its own order.

    A gradient is then consumed while it is warm, and a statistic leaves as soon as it exists. Writes stay at the end, behind
    every reader of what they overwrite.
    """
    nodes = list(step.graph.nodes)
    ready = readiness(step.graph, in_line(step.graph))
    first_place = max((i for i, n in enumerate(nodes) if n.op == "placeholder"), default=-1)  # none among the inputs
    keys = {}
    for i, node in enumerate(nodes):
        written = _is_written(node)
        keys[node] = (max(ready[node], first_place) if written else i, written, i)
    reorder(step.graph, keys)


def readiness(graph: fx.Graph, behind: Mapping[fx.Node, fx.Node] | None = None) -> dict[fx.Node, int]:
    """Where in the captured program a node's last operand is made; what the library has written can follow at once.

    Nodes in ``behind`` also wait for another one.
    """
    ready: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        operands = (ready[arg] for arg in operands_of(node, behind or {}))
        ready[node] = max(operands, default=0) if _is_written(node) else i
    return ready


def operands_of(node: fx.Node, behind: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """What a node needs, and what it must stay behind."""
    return [*node.all_input_nodes, *([behind[node]] if node in behind else [])]


def _is_written(node: fx.Node) -> bool:
    return bool(node.meta.get("mkor_fx")) and node.target is not aten.copy_.default


def reorder(graph: fx.Graph, keys: dict[fx.Node, Any]) -> None:
    """Sort all but inputs and output by ``keys``, which must not put a node in front of its operands."""
    output = graph.output_node()
    for node in sorted((n for n in graph.nodes if n.op not in ("placeholder", "output")), key=keys.__getitem__):
        output.prepend(node)


def sort_by_dependencies(graph: fx.Graph, behind: Mapping[fx.Node, fx.Node] | None = None) -> None:
    """Move nodes that stand behind a reader of theirs in front of it; the others keep their order.

    Nodes in ``behind`` go behind another one as if they read it.
    """
    places: dict[fx.Node, int] = {}

    def place(node: fx.Node) -> None:
        if node not in places:
            for arg in operands_of(node, behind or {}):
                place(arg)
            places[node] = len(places)

    for node in list(graph.nodes):
        place(node)
    reorder(graph, places)
