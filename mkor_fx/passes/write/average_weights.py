"""The exponential moving average of the weights, beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import inputs
from ...runtime.averages import dtype_of_average
from ..core import graph_pass
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def average_weights(draft: StepDraft) -> None:
    """``A <- A + (1 - ema) (W - A)`` behind every step that counts, the first ``A <- W``, as ``torch.optim.swa_utils``."""
    if draft.plan.ema is None:
        return
    label = "average of weights"
    count = draft.scalar(inputs.Averaged(), torch.int64)
    draft.writes[count] = draft.insert(torch.add, count, 1, label=label)
    for index in draft.plan.trained:
        weight = draft.weight(index)
        new, dtype = draft.writes.get(weight, weight), dtype_of_average(draft.plan.params[index].dtype)
        average = draft.input(inputs.Average(index), torch.empty_like(weight.meta["val"], dtype=dtype))
        draft.writes[average] = draft.insert(moved, average, new, count, 1 - draft.plan.ema, label=label)


def moved(average: Tensor, weight: Tensor, count: Tensor, share: float) -> Tensor:
    weight = weight.to(average.dtype)
    return torch.where(count == 0, weight, average + share * (weight - average))
