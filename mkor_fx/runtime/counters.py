"""Numbers that an optimizer's own step changes, as a count of steps in a group: tensors that a program advances.

Where an optimizer keeps one as a Python number, the compiled step puts a 0-dim tensor in its place, int64 or float64, on the
parameters' device: there the optimizer finds the number that its own loop would have left, and goes on from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass
class Counters:
    """By key: in the groups (True: kept as a Python number by the optimizer itself) and in the state of parameters.

    ``of_gradient``: state is made of the first gradient, so that it cannot be made before."""

    groups: dict[str, bool] = field(default_factory=dict)
    state: set[str] = field(default_factory=set)
    of_gradient: bool = False


_known: weakref.WeakKeyDictionary[Any, Counters] = weakref.WeakKeyDictionary()


def counters_of(optimizer: Any) -> Counters:
    """Live; there are none before the optimizer's step has been looked at."""
    return _known.setdefault(optimizer, Counters())


def is_python_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_tensor(value: Any, device: torch.device) -> Tensor:
    """A number as a program keeps it."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.int64 if isinstance(value, int) else torch.float64, device=device)


def settle_state(optimizer: Optimizer, state: dict[str, Any], device: torch.device) -> None:
    """Tensors in the place of Python numbers in what is kept for a parameter, all on its device."""
    for key, value in state.items():
        if is_python_number(value):
            counters_of(optimizer).state.add(key)
        if is_python_number(value) or (isinstance(value, Tensor) and value.device != device):
            state[key] = as_tensor(value, device)


def settle_group(group: dict[str, Any], key: str, device: torch.device) -> Tensor:
    """A group's counter as a tensor on ``device``, which stays in the group."""
    value = group[key]
    if not isinstance(value, Tensor) or value.device != device:
        group[key] = as_tensor(value, device)
    return group[key]


def places(counters: Counters, group: Mapping[str, Any]) -> list[str]:
    """The keys of a group's counters, in a fixed order."""
    return sorted(key for key in counters.groups if key in group)
