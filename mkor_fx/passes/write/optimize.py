"""New weights from directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ...prims import accumulation_dtype
from ..core import graph_pass
from .draft import Draft


@graph_pass(stage="rewrite")
def optimize(draft: Draft) -> None:
    """The optimizer's own step on the directions; where a direction is the step itself,
    ``W <- W (1 - lr wd) - lr D`` with the rate and weight decay of the weight's group."""
    for key in [key for key in draft.directions if key in draft.final]:
        weight, rate = draft.weight(key), draft.rate(key)
        draft.writes[weight] = draft.insert(
            step_along, weight, draft.directions[key], *rate, label="optimizer"
        )
    draft.apply_optimizer()


def step_along(
    weight: Tensor, direction: Tensor, numbers: Tensor, rate_at: int, decay_at: int | None, sign: float,
    trust: tuple[float, float] | None,
) -> Tensor:
    """``numbers`` are the optimizer's, packed; ``sign`` is -1 where it maximizes; with ``trust`` the direction gets the
    norm of the weight, where that has one, their quotient within these bounds. Computed in float32 at least."""
    wide = accumulation_dtype(weight.dtype)
    if trust is not None:
        norms = [torch.linalg.vector_norm(t, dtype=wide) for t in (weight, direction)]
        quotient = norms[0] / norms[1]
        usable = torch.isfinite(quotient) & (quotient > 0)
        direction = direction * torch.where(usable, quotient.clamp(*trust), torch.ones_like(quotient)).to(direction.dtype)
    rate = numbers[rate_at].to(wide)
    kept = weight.to(wide) if decay_at is None else weight.to(wide) * (1 - rate * numbers[decay_at].to(wide))
    return (kept - sign * rate * direction.to(wide)).to(weight.dtype)
