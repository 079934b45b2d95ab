"""Two transposes in a row are none."""

from __future__ import annotations

from torch import fx

from ...ir import StepGraph
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code
from .spell_transposes import is_transpose


@graph_pass(stage="canonicalize", exact=True)
def cancel_double_transpose(step: StepGraph) -> None:
    """``permute(permute(x, [1, 0]), [1, 0])`` -> ``x``."""
    for node in list(step.graph.nodes):
        inner = node.args[0] if is_transpose(node) else None
        if isinstance(inner, fx.Node) and is_transpose(inner):
            node.replace_all_uses_with(inner.args[0])
    eliminate_dead_code(step.graph)
