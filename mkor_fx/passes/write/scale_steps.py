"""Steps of the base optimizer in the place of a rule's."""

from __future__ import annotations

import torch

from ...runtime.switch import part_of_the_way
from ..core import graph_pass
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def scale_steps(draft: StepDraft) -> None:
    """``W <- W + r s (W' - W)``, where the base optimizer has made ``W'`` of a weight that a rule leaves to it for now: as
    a rate of ``r s`` times its group's, for every optimizer whose step is proportional to the rate. ``s`` warms it up."""
    for index, site in draft.step.sites.items():
        share = draft.share_of_rate(index) if site.rule is not None else 1.0
        if share == 1.0:
            continue
        for at in [index] + ([] if site.bias is None else [site.bias.index]):
            weight = draft.weight(at)
            if weight in draft.writes:
                taken = draft.insert(torch.mul, draft.warmth(), share, label="optimizer")
                draft.writes[weight] = draft.insert(part_of_the_way, weight, draft.writes[weight], taken, label="optimizer")
