"""What an optimizer would do with a gradient, as far as the size of a step that takes its place follows from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .optimizer_state import Number, numbers_of
from .optimizers import Groups, owner_of

#: no bounds
ANY = (0.0, math.inf)


class BaseStep(NamedTuple):
    """``kind``: ``"adam"``: a step of Adam's size whatever the gradient's; ``"sgd"``: the momentum, or the gradient
    where there is none; ``"trust"``: the weight's own size; ``"other"``: what nobody here knows. ``momentum_at`` is
    where SGD's momentum lies among the optimizer's numbers, None where it has none; ``nesterov`` is its flag. ``trust``
    are the bounds of a ratio to the weight's size."""

    kind: str
    momentum_at: int | None = None
    nesterov: bool = False
    trust: tuple[float, float] = ANY


def base_step_of(optimizer: Groups, at: int) -> BaseStep:
    """What ``optimizer`` does with the parameters of group ``at``. Optimizers of other libraries are known by their names:
    Adam's relatives have its name in theirs, as ``FusedAdam`` and ``AdamW8bit``; so have LAMB and LARS."""
    group, owner = optimizer.param_groups[at], owner_of(optimizer, at)
    names = [cls.__name__.lower() for cls in type(owner).__mro__]
    if group.get("adapt_all") is False and not group["weight_decay"]:  # our LAMB without its trust ratio
        return BaseStep("adam")
    if any("lamb" in name or "lars" in name for name in names):
        bounds = group.get("trust")
        return BaseStep("trust", trust=bounds if isinstance(bounds, tuple) else ANY)
    if any("adam" in name for name in names) or group.get("adjust_lr_fn") == "match_rms_adamw":
        return BaseStep("adam")
    if isinstance(owner, torch.optim.SGD):
        momentum, plain = Number(at, "momentum"), not group["dampening"]
        if not group["momentum"]:
            return BaseStep("sgd")
        numbers = numbers_of(optimizer)
        if plain and momentum in numbers:
            return BaseStep("sgd", numbers.index(momentum), bool(group["nesterov"]))
    return BaseStep("other")
