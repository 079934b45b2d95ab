"""A part of a batch: what it adds to the sums of the whole."""

from __future__ import annotations

import torch

from ..core import graph_pass
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def accumulate(draft: StepDraft) -> None:
    """Add the part's share of the loss, its gradients and statistics to what the parts before it have come to, in place."""
    for key, node in draft.parts().items():
        held = draft.sum_of(key, node)
        draft.writes[held] = draft.insert(torch.add, held, node, label="accumulate")
