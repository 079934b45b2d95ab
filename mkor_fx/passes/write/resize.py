"""The size of the next step's directions, where directions are made in the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import graph_pass
from .carrier import Carrier
from .update_draft import UpdateDraft


@graph_pass(stage="rewrite")
def resize(draft: UpdateDraft) -> None:
    """``scale <- |G| / |D|`` of this step, of weight and bias of each matrix."""
    for key, item in draft.items.items():
        carrier = draft.carriers[key]
        item.scale = draft.insert(quotient_of_norms, carrier, item.scale, label=f"{item.name}: scale")


def quotient_of_norms(carrier: Tensor, scale: Tensor) -> Tensor:
    """``[*members, 2]``; as it was where the quotient is of no use."""
    norms = Carrier.squared_norms(carrier, tuple(scale.shape[:-1]))
    quotient = (norms[..., 0::2] / norms[..., 1::2]).sqrt().to(scale.dtype)
    usable = torch.isfinite(quotient) & (quotient > 0) & torch.isfinite(carrier).all()
    return torch.where(usable, quotient, scale)
