"""How long a direction is, and whether it is the step itself: what its rule says, in front of its optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...rules import Rule
from ...runtime.base_step import BaseStep


class Sizing(NamedTuple):
    """``graft`` sizes the direction, ``final`` ones are the step itself. ``fields`` of the rule take the place of its own;
    ``momentum_at`` is where its momentum lies among the optimizer's numbers, where that is the optimizer's. ``trust``: the
    step is brought to the size of the weight."""

    graft: str | None
    final: bool
    fields: tuple[tuple[str, Any], ...] = ()
    momentum_at: int | None = None
    trust: bool = False

    @classmethod
    def of(cls, rule: Rule, base: BaseStep | None) -> Sizing:
        """``base`` is what the optimizer would do with the gradient."""
        if not rule.follows_optimizer or base is None or base.kind == "adam":
            return cls(rule.graft, rule.applies == "update")
        if base.kind == "trust":
            return cls(rule.graft, True, trust=True)
        if base.kind == "other":
            return cls("gradient", False)
        if base.momentum_at is None:
            return cls("gradient", True)
        return cls("moment", True, (("nesterov", base.nesterov),), base.momentum_at)
