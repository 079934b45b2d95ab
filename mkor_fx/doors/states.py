"""What states a weight could have, before any graph has shown how it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..rules import Rules, Shape


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


def _shapes(param: nn.Parameter) -> Iterator[Shape]:
    """The parameter as a matrix, split in two at any of its dimensions, either side the outputs."""
    for split in range(1, param.dim()):
        first, last = param.shape[:split].numel(), param.shape[split:].numel()
        for bias in (False, True):
            yield Shape(first, last, bias)
            yield Shape(last, first, bias)
    if param.dim() == 2:
        yield Shape(param.shape[1], param.shape[0], lookup=True)
