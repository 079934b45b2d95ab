"""What was packed into one tensor to be sent, and is not sent, is not packed."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...ir import StepGraph
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code
from ..torch_api.tracing import fake_value

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.alias.default, aten.slice.Tensor, aten.reshape.default, aten._unsafe_view.default)


@graph_pass(stage="lower", exact=True)
def unpack(step: StepGraph) -> None:
    """``split(cat([a, b]), sizes)`` -> ``a``, ``b``, of vectors, where the sizes are theirs."""
    for node in list(step.graph.nodes):
        if node.target is not aten.split_with_sizes.default:
            continue
        packed = _unviewed(node.args[0])
        if packed.target is not aten.cat.default or fake_value(packed).dim() != 1:
            continue
        parts = packed.args[0]
        if [fake_value(part).numel() for part in parts] == list(node.args[1]):
            for user in list(node.users):
                if user.target is operator.getitem:
                    user.replace_all_uses_with(parts[user.args[1]])
    eliminate_dead_code(step.graph)


def _unviewed(vector: fx.Node) -> fx.Node:
    """Behind views that leave a vector what it is."""
    while vector.target in VIEWS and fake_value(vector.args[0]).shape == fake_value(vector).shape:
        vector = vector.args[0]
    return vector
