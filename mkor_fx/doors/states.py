"""What can be said of a model's weights before any graph has shown how they are used: states, and when each refreshes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..options import Options
from ..passes.naming import Naming
from ..rules import Rule, Rules, Shape
from ..runtime.rotation import Rotation
from ..show.costs import refresh_flops


def possible_states(rules: Rules, sized_later: bool = False) -> Callable[[str, nn.Parameter], list[dict[str, Tensor]]]:
    """``expect(name, param)``: the state that its rule would keep for each matrix that the parameter may be seen as, without
    memory; the usual one first. Empty where nothing can be said. ``sized_later``: with the backward mode's ``scale``."""
    more = {"scale": torch.empty(2, device="meta")} if sized_later else {}

    def expect(name: str, param: nn.Parameter) -> list[dict[str, Tensor]]:
        entry = rules.match(name)
        if entry is None or entry[1] is None:
            return []
        rule = entry[1].at_first_step
        found = (rule.init(shape, torch.device("meta")) for shape in _shapes(param))
        return [{**state, **more} for state in found if state]

    return expect


def slots_of(model: nn.Module, options: Options) -> dict[str, int]:
    """How many steps behind the first of its window each weight's state is derived, by names, shapes and rules alone; none
    where all are derived at once."""
    rotation, costs = rotation_of(model, options), dict[int, dict[str, int]]()
    for name, param, rule in _weights(model, options) if options.derive == "spread" else ():
        if rule.overrides("derive"):
            state = rule.at_first_step.init(next(_shapes(param)), torch.device("meta"))
            costs.setdefault(rule.derive_every, {})[name] = sum(t.shape[-1] ** 3 for t in state.values() if t.dim() > 1)
    return {name: slot for every, own in costs.items() for name, slot in Rotation.slots(every, own, rotation.offset).items()}


def _weights(model: nn.Module, options: Options) -> Iterator[tuple[str, nn.Parameter, Rule]]:
    """The matrices that a rule may be for."""
    naming = Naming.of(model, options.skip, options.rules)
    for name, param in model.named_parameters():
        entry = options.rules.match(name)
        if param.dim() > 1 and entry is not None and entry[1] is not None and naming.excluded(name) is None:
            yield name, param, entry[1]


def rotation_of(model: nn.Module, options: Options) -> Rotation:
    """Which weights refresh when, by names, shapes and rules alone: the same on every rank and in every resumed run."""
    rules, phases = options.rules, options.refresh_phases if options.rules else 1
    weights = _weights(model, options) if phases > 1 else ()
    costs = {name: refresh_flops(rule.at_first_step, next(_shapes(param))) for name, param, rule in weights}
    return Rotation.of(options.refresh_every if rules else 1, phases, costs)


def _shapes(param: nn.Parameter) -> Iterator[Shape]:
    """The parameter as a matrix, split in two at any of its dimensions, either side the outputs."""
    for split in range(1, param.dim()):
        first, last = param.shape[:split].numel(), param.shape[split:].numel()
        for bias in (False, True):
            yield Shape(first, last, bias)
            yield Shape(last, first, bias)
    if param.dim() == 2:
        yield Shape(param.shape[1], param.shape[0], lookup=True)
