"""Scalars are computed once."""

from __future__ import annotations

import torch

from ...ir import StepGraph
from ..core import graph_pass
from .expand import INHERITED


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
