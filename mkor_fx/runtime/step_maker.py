"""What the runtime of a compiled step is handed by those who know rules and graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .speeds import Speeds


@dataclass(frozen=True)
class StepMaker:
    """What the runtime is handed, which knows neither rules nor graphs.

    ``choose(step, fallback, due)`` names the variant of a step, or that of one which refreshes the weights ``due``
    alone (None: all);
    ``build(compiled step, variant)`` makes its program. ``check()`` holds model and optimizer to what a step takes,
    ``check_call(args, kwargs)`` the arguments of a call.
    ``derive(step, recipe, state, taken)`` makes state of state, every ``derive_every(recipe)`` steps, and
    ``moving(recipe)`` names what changes otherwise;
    ``numbers(step, device)`` are those of the rules. ``keepers`` is how many ranks keep a weight that has an owner.
    ``part_of(variant)`` is that of the ``parts`` of a batch before the last. ``ema`` is the decay of averages of the
    weights.
    ``speeds`` are those of ranks and network, where they are known.
    """

    choose: Callable[..., Any]
    build: Callable[[Any, Any], Callable[..., Any]]
    check: Callable[[], None]
    check_call: Callable[[tuple, dict], None]
    derive: Callable[..., dict[str, Tensor]]
    derive_every: Callable[[Any], int | None]
    moving: Callable[[Any], Collection[str]]
    numbers: Callable[[int, torch.device], Tensor | None]
    keepers: int
    part_of: Callable[[Any], Any]
    parts: int = 1
    ema: float | None = None
    speeds: Speeds | None = None
