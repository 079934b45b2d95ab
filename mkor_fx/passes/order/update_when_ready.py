"""What the library has written goes where its last operand is made."""

from __future__ import annotations

from ...ir import StepGraph
from ..core import graph_pass
from .collectives import in_line
from .dependencies import is_written, readiness, reorder


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
        written = is_written(node)
        keys[node] = (max(ready[node], first_place) if written else i, written, i)
    reorder(step.graph, keys)
