"""When a node can run, and orders that respect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def readiness(graph: fx.Graph, behind: Mapping[fx.Node, fx.Node] | None = None) -> dict[fx.Node, int]:
    """Where in the captured program a node's last operand is made; what the library has written can follow at once.

    Nodes in ``behind`` also wait for another one.
    """
    ready: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        operands = (ready[arg] for arg in operands_of(node, behind or {}))
        ready[node] = max(operands, default=0) if is_written(node) else i
    return ready


def operands_of(node: fx.Node, behind: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """What a node needs, and what it must stay behind."""
    return [*node.all_input_nodes, *([behind[node]] if node in behind else [])]


def is_written(node: fx.Node) -> bool:
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
