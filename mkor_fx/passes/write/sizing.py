"""How long a direction is, and whether it is the step itself: what its rule says, in front of its optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...rules import Rule
from ...rules.hybrid import ADAM_FOR_RULE
from ...runtime.base_step import BaseStep, base_step_of
from ...runtime.optimizers import Groups, owner_of


class Sizing(NamedTuple):
    """``graft`` sizes the direction, ``final`` ones are the step itself. ``fields`` of the rule take the place of its own;
    ``momentum_at`` is where its momentum lies among the optimizer's numbers, where that is the optimizer's. ``trust``: the
    step is brought to the size of the weight, by a ratio within these bounds."""

    graft: str | None
    final: bool
    fields: tuple[tuple[str, Any], ...] = ()
    momentum_at: int | None = None
    trust: tuple[float, float] | None = None

    def share_of_rate(self, chosen: float | None) -> float:
        """Of a step that the base optimizer takes in the place of the rule, with what a ``Hybrid`` says of it."""
        return (ADAM_FOR_RULE if self.graft == "adam" else 1.0) if chosen is None else chosen

    @classmethod
    def of(cls, rule: Rule, base: BaseStep | None) -> Sizing:
        """``base`` is what the optimizer would do with the gradient."""
        if not rule.follows_optimizer or base is None:
            return cls(rule.graft, rule.applies == "update")
        if base.kind == "adam":
            return cls("adam" if rule.graft == "rms" and rule.overrides("adam_rms") else rule.graft, True)
        if base.kind == "trust":
            return cls(rule.graft, True, trust=base.trust)
        if base.kind == "other":
            return cls("gradient", False)
        if base.momentum_at is None:
            return cls("gradient", True)
        return cls("moment", True, (("nesterov", base.nesterov),), base.momentum_at)


def trainer_of(rule: Rule | None, optimizer: Groups, at: int) -> str:
    """Who trains a weight of group ``at``, for the reader of a table: its rule, or its optimizer."""
    name = type(owner_of(optimizer, at)).__name__
    if rule is None:
        return name
    sizing, own = Sizing.of(rule, base_step_of(optimizer, at)), type(rule).__name__
    if not sizing.final:
        return f"{name}, on {own}'s direction"
    if sizing.trust is not None:
        return f"{own}, {name}'s trust ratio"
    if not rule.follows_optimizer:
        return f"{own}, at {name}'s rate"
    return f"{own}, steps of {name}'s size" if sizing.graft in ("rms", "adam") else f"{own}, steps as long as {name}'s"
