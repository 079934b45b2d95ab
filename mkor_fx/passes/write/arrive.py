"""Statistics of the step before."""

from __future__ import annotations

from ...runtime.inputs import Arriving
from ..core import graph_pass
from ..torch_api.tracing import insert
from .late_statistics import nothing
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def arrive(draft: StepDraft) -> None:
    """What the last step has sent, and whether that step was taken."""
    graph, network, late = draft.graph, draft.network, draft.plan.late
    draft.taken, *flat = (draft.input(Arriving(i), t) for i, t in enumerate(nothing(late, draft.device)))
    with graph.inserting_before(draft.step.output):
        for buffer, node in zip(late, flat):
            arrived = node if network is None else network.wait(node)
            parts = insert(graph, buffer.split, arrived, label="statistics of the last step")
            for vector, part in zip(buffer.vectors, parts):
                draft.statistics.setdefault(vector.index, {})[vector.kind] = part
    draft.hand_out()
