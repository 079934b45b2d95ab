"""Collectives beside the work that hides them: issued when their operand is there, awaited where they are first needed."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from ...ir import StepGraph
from ..core import graph_pass
from .collectives import in_line, is_start, is_wait
from .dependencies import operands_of, reorder

aten = torch.ops.aten
#: (level, arrival, place, moved, number): see ``order``
Key = tuple[float, int, int, bool, int]


@graph_pass(stage="schedule", exact=True)
def schedule(step: StepGraph) -> None:
    """Start each collective behind its last producer and wait for it in front of its first reader."""
    order(step.graph)


def is_heavy(node: fx.Node) -> bool:
    """A product or a convolution: what there is to hide communication under."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in flop_registry or "attention" in str(packet)


def order(graph: fx.Graph, divided: bool = False) -> None:
    """Sort a graph with collectives; the order depends on the graph alone, so it is the same on every rank. Where graphs
    are not (``in_line``), or are known to be ``divided``, collectives keep the order that they have.

    A node's *level* is the number of waits in a row that it needs. Levels follow each other: all work that does not need
    a result goes before all that does. Inside a level, what needs results goes in the order in which these were asked for
    (*arrival*), so that the first buckets' updates hide the last buckets' flight. What is computed for a collective alone
    moves up to its operands, what is computed for later levels alone moves down to its readers. Writes come last.
    """
    nodes = list(graph.nodes)
    if not any(map(is_start, nodes)):
        return
    behind = in_line(graph, divided)
    number = {node: i for i, node in enumerate(nodes)}
    levels: dict[fx.Node, int] = {}
    for node in nodes:
        levels[node] = max((levels[arg] for arg in operands_of(node, behind)), default=0) + is_wait(node)
    prologue: set[fx.Node] = set()
    for node in reversed(nodes):
        if is_start(node) or (_is_free(node) and node.users and all(user in prologue for user in node.users)):
            prologue.add(node)

    place: dict[fx.Node, int] = {}
    for node in nodes:
        moved = node in prologue
        operands = (place[arg] for arg in operands_of(node, behind))
        place[node] = max(operands, default=-1) if moved else number[node]

    keys: dict[fx.Node, Key] = {}
    arrival: dict[fx.Node, int] = {}
    issued: dict[fx.Node, int] = {}
    for level in sorted(set(levels.values())):
        own = [node for node in nodes if levels[node] == level]
        for node in own:
            if is_wait(node):
                arrival[node] = issued.get(node.args[0], -1)  # an input: another step has asked for it
            else:
                arguments = (arg for arg in operands_of(node, behind) if levels[arg] == level)
                arrival[node] = max((arrival[arg] for arg in arguments), default=-1)
            keys[node] = (level, arrival[node], place[node], node in prologue, number[node])
        for start in sorted((node for node in own if is_start(node)), key=keys.__getitem__):
            issued[start] = len(issued)
    for node in reversed(nodes):
        if node.target is aten.copy_.default:
            keys[node] = (math.inf, 0, 0, False, number[node])
        elif _is_free(node) and node not in prologue and not is_wait(node):
            first = min((keys[user] for user in node.users), default=keys[node])
            if first[0] > levels[node] and first[0] != math.inf:
                keys[node] = (*first[:4], number[node])
    reorder(graph, keys)


def _is_free(node: fx.Node) -> bool:
    """Cheap, and neither an input, nor random, nor with an effect: it may move."""
    return node.op in ("call_function", "get_attr") and not is_heavy(node) and not node.is_impure()


def hidden_under(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each wait what stands between it and its start: heavy work and other starts, in order."""
    nodes = list(graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    return {
        wait: [n for n in nodes[number[wait.args[0]] + 1 : number[wait]] if is_heavy(n) or is_start(n)]
        for wait in filter(is_wait, nodes)
    }
