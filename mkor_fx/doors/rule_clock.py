"""Rules in time: their numbers at a step, and what they derive behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..passes.match.layout import Layout
from ..passes.write.derive import derive_one, moving_state
from ..passes.write.draft import changing_of
from ..rules import Rule, Rules
from ..rules.hyper import changing, value_at
from ..runtime.packed_numbers import PackedNumbers


class RuleClock:
    """What changes over time in ``rules``."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._order = changing_of(list(rules))
        self._packed: dict[torch.device, PackedNumbers] = {}
        self._checked: dict[Rule, dict[str, float]] = {}

    def numbers(self, step: int, device: torch.device) -> Tensor | None:
        """The present values, packed in the order of the programs; None where nothing changes.

        Raises:
            ValueError: a function of the step gives what its rule refuses.
        """
        if not self._order:
            return None
        values = {rule: self.of(rule, step) for rule in self._rules}
        if device not in self._packed:
            self._packed[device] = PackedNumbers(len(self._order), device)
        return self._packed[device].write(values[rule][name] for rule, name in self._order)

    def of(self, rule: Rule, step: int) -> dict[str, float | Tensor]:
        """The present values of one rule's changing fields, by name."""
        about = type(rule).__name__
        values = {name: value_at(hyper, f"{about}({name}=", step) for name, hyper in changing(rule).items()}
        plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        if plain != self._checked.get(rule, {}):
            dataclasses.replace(rule.at_first_step, **plain)  # type: ignore[type-var]  # which checks them
            self._checked[rule] = plain
        return values

    @staticmethod
    def derive_every(recipe: Any) -> int | None:
        """Steps between two derivations of a weight's state; None for a rule that derives nothing."""
        rule = recipe.layout.rule
        return rule.derive_every if rule.overrides("derive") else None

    @staticmethod
    def moving(recipe: Any) -> frozenset[str]:
        """The tensors of a weight's state that change otherwise than by being derived."""
        return moving_state(recipe.layout.rule.at_first_step, recipe.layout.shape)

    def derive(self, step: int, recipe: Any, state: dict[str, Tensor], taken: Tensor | None = None) -> dict[str, Tensor]:
        """New state of the old, behind a step; as it was where the step was not ``taken`` (0-dim)."""
        layout: Layout = recipe.layout
        own = dict(state)
        sizes = {key: own.pop(key) for key in recipe.not_the_rules}
        numbers = {
            key: torch.as_tensor(value, dtype=torch.float64, device=next(iter(own.values())).device)
            for key, value in self.of(layout.rule, step).items()
        }
        return {**derive_one(layout, numbers, own, taken), **sizes}
