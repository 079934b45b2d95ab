"""State from state, outside of any program."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules.hyper import bind
from ..match.layout import Layout
from .refresh import all_finite, choose
from .vectors import Numbers


def derives_at(layout: Layout, step: int) -> bool:
    """Whether the rule's ``derive`` is to run behind a step."""
    return layout.rule.overrides("derive") and step % layout.rule.derive_every == 0


def derive_one(
    layout: Layout, numbers: Numbers, state: dict[str, Tensor], taken: Tensor | None = None
) -> dict[str, Tensor]:
    """New state of one weight; as it was where something in it is not finite, or the step was not ``taken`` (0-dim)."""
    rule = bind(layout.rule, numbers)
    with torch.no_grad():
        new = layout.each(rule.derive)(state)
        changed = [t for name, t in new.items() if t is not state[name] and t.is_floating_point()]
        if not changed:
            return new
        keep = all_finite(changed)
        return choose(keep if taken is None else keep & taken, new, state)
