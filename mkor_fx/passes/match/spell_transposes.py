"""One spelling for transposes."""

from __future__ import annotations

import torch
from torch import fx

from ...ir import StepGraph, fake_value
from ..core import graph_pass

aten = torch.ops.aten


@graph_pass(stage="canonicalize", exact=True)
def spell_transposes(step: StepGraph) -> None:
    """``t(x)``, ``transpose(x, 0, 1)`` of a matrix -> ``permute(x, [1, 0])``."""
    for node in list(step.graph.nodes):
        two_d = node.target is aten.transpose.int and fake_value(node).dim() == 2 and node.args[1] != node.args[2]
        if (node.target is aten.t.default and fake_value(node).dim() == 2) or two_d:
            node.target, node.args = aten.permute.default, (node.args[0], [1, 0])


def is_transpose(node: fx.Node) -> bool:
    return swaps_last_two(node) and len(node.args[1]) == 2


def swaps_last_two(node: fx.Node) -> bool:
    """Whether a node transposes each matrix of a batch, or the one that it is."""
    if node.target is not aten.permute.default:
        return False
    rank = len(node.args[1])
    return [d % rank for d in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]
