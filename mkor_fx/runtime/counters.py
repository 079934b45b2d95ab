"""Numbers that an optimizer's own step changes, as a count of steps in a group: tensors that a program advances.

Where an optimizer keeps one as a Python number, the compiled step puts a 0-dim float64 tensor in its place, on the
parameters' device: there the optimizer finds the number that its own loop would have left, and goes on from it. Its
``state_dict()`` has Python numbers, as its own loop would save them.
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
    """By key, with the type that the optimizer itself has there: in the groups, and numbers in the state of parameters.

    ``of_gradient``: state is made of the first gradient, so that it cannot be made before."""

    groups: dict[str, type] = field(default_factory=dict)
    state: dict[str, type] = field(default_factory=dict)
    of_gradient: bool = False
    saved_as_numbers: bool = False


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
    return torch.full((), value, dtype=torch.float64, device=device)


def settle_state(optimizer: Optimizer, state: dict[str, Any], device: torch.device) -> None:
    """Tensors in the place of Python numbers in what is kept for a parameter, all on its device."""
    for key, value in state.items():
        if is_python_number(value):
            counters_of(optimizer).state.setdefault(key, type(value))
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


def save_numbers(optimizer: Optimizer) -> None:
    """Let ``state_dict()`` have Python numbers where the optimizer itself would have such."""
    counters = counters_of(optimizer)
    if not counters.saved_as_numbers:
        counters.saved_as_numbers = True
        optimizer.register_state_dict_post_hook(_as_numbers)


def _as_numbers(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    counters = counters_of(optimizer)
    groups = [_with_numbers(group, counters.groups) for group in saved["param_groups"]]
    state = {at: _with_numbers(own, counters.state) for at, own in saved["state"].items()}
    return {**saved, "state": state, "param_groups": groups}


def _with_numbers(held: Any, types: Mapping[str, type]) -> Any:
    if not isinstance(held, dict) or not types:
        return held
    return {key: _number(value, types.get(key, Tensor)) for key, value in held.items()}


def _number(value: Any, kept: type) -> Any:
    if kept is Tensor or not isinstance(value, Tensor):
        return value
    number = float(value)
    return int(number) if kept is int and number.is_integer() else number
