"""One order of collectives for ranks whose graphs differ."""

from __future__ import annotations

from itertools import pairwise

from torch import fx

from ...ir import StepGraph
from ..core import graph_pass
from .collectives import in_line, starts
from .dependencies import readiness, sort_by_dependencies

#: collectives whose operands differ in kind from rank to rank are issued last, and in this order
LATE = {"squares": 1, "products": 2, "direction": 3, "norms": 4}


@graph_pass(stage="schedule", exact=True)
def issue_alike(step: StepGraph) -> None:
    """Put collectives in an order that all ranks derive alike, where weights have owners.

    What the captured program alone determines goes by readiness, then what clips directions, then directions, then what
    decides whether to skip.
    ``update_when_ready`` and ``schedule`` keep this order.
    """
    if not in_line(step.graph):
        return
    ready = readiness(step.graph)

    def when(start: fx.Node) -> tuple:
        messages = start.meta["mkor_messages"]
        late = LATE.get(messages[0].kind, 0)
        again = messages[0].kind == "column"
        return (late,) if late else (late, ready[start], again, str(start.target), list(map(str, messages)))

    line = sorted(starts(step.graph), key=when)
    sort_by_dependencies(step.graph, {after: before for before, after in pairwise(line)})
