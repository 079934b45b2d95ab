"""Activation checkpoints in a graph that is never partitioned."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ...ir import StepGraph
from ..core import graph_pass
from ..match.find_sites import downstream

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
