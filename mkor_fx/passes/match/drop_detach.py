"""What only autograd looks at."""

from __future__ import annotations

import torch

from ...ir import StepGraph
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code

aten = torch.ops.aten


@graph_pass(stage="canonicalize", exact=True)
def drop_detach(step: StepGraph) -> None:
    """``detach(x)``, ``alias(x)`` -> ``x``: nothing in a captured graph differentiates it again."""
    for node in list(step.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    eliminate_dead_code(step.graph)
