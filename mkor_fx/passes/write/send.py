"""Statistics that leave for the next step."""

from __future__ import annotations

import torch

from ..core import graph_pass
from ..order.collectives import Message
from ..torch_api.tracing import insert
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def send(draft: StepDraft) -> None:
    """The statistics in one buffer for each dtype, summed over ranks but not waited for: nobody may read them, or copy
    them, before ``arrive``."""
    graph, network = draft.graph, draft.network
    with graph.inserting_before(draft.step.output):
        for buffer in draft.plan.late:
            nodes = [draft.statistics[vector.index][vector.kind] for vector in buffer.vectors]
            flat = insert(graph, torch.cat, nodes, label="statistics for the next step")
            messages = [Message("statistics", vector.name, vector.numel) for vector in buffer.vectors]
            draft.sent.append(flat if network is None else network.start_sum(flat, messages))
    draft.statistics = {}
    draft.hand_out()
