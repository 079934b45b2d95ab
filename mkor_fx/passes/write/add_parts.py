"""The last part of a batch: with the sums of the others it is the whole."""

from __future__ import annotations

import torch

from ..core import graph_pass
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def add_parts(draft: StepDraft) -> None:
    """Loss, gradients and statistics of all parts of a batch, where it comes in parts."""
    if not draft.plan.parts:
        return
    whole, label, dtype = {}, "accumulate", draft.outputs[0].meta["val"].dtype
    for key, node in draft.parts().items():
        whole[key] = draft.insert(torch.add, draft.sum_of(key, node), node, label=label)
    draft.outputs[0] = draft.insert(torch.Tensor.to, whole.pop(("loss",)), dtype, label=label)
    draft.gradients |= {key[1]: node for key, node in whole.items() if key[0] == "gradient"}
    for (_, index, kind), node in ((key, node) for key, node in whole.items() if key[0] == "statistics"):
        draft.statistics[index][kind] = node
    draft.hand_out()
