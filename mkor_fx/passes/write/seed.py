"""The gradient that the backward starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.inputs import Rows
from ..core import graph_pass
from ..torch_api.tracing import insert
from .step_draft import StepDraft

aten = torch.ops.aten


@graph_pass(stage="rewrite")
def seed(draft: StepDraft) -> None:
    """Write the gradient of the mean loss over ranks with respect to this rank's: one without a network.

    Ranks weigh the same, or each by its number of rows; of a part of a batch it is the part's share of that. Left out,
    it stays an input, which is one.
    """
    graph, network = draft.graph, draft.network
    value = draft.step.seeds[0].meta["val"]
    weighed = draft.plan.rows and network is not None
    count = draft.scalar(Rows(), torch.float32) if weighed else None
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        if network is not None and count is not None:
            total = network.sum(count, "rows", "the batch")
            share = draft.share = insert(graph, share_of, count, total, value.dtype, label="share of the batch")
        else:
            draft.share = 1.0 if network is None else 1.0 / network.size
            share = graph.call_function(
                aten.full.default, ([], draft.share), {"dtype": value.dtype, "device": value.device}
            )
            share.meta["val"] = value
        if draft.plan.parts:
            share = insert(graph, times, share, draft.share_of_batch(), label="share of the batch")
    draft.replace_seed(share)


def times(share: Tensor, part: Tensor) -> Tensor:
    return share * part.to(share.dtype)


def share_of(rows: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    return (rows / total).to(dtype)
