"""Hyper-parameters that change over time: read on the host, handed to compiled programs as 0-dim tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

#: a rule; what a rule is stands in ``base.py``, above this file
R = TypeVar("R")

#: a number, a 0-dim tensor that is read anew at each step, or a function of the step
if TYPE_CHECKING:
    Hyper: TypeAlias = Any  # to the code of a rule it is a number or a 0-dim tensor
else:
    Hyper = float | Tensor | Callable[[int], float]


def changing(rule: Any) -> dict[str, Tensor | Callable[[int], float]]:
    """The fields of a rule whose value is not fixed, by name."""
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if _is_hyper(field)}  # type: ignore
    return {name: value for name, value in fields.items() if isinstance(value, Tensor) or callable(value)}


def _is_hyper(field: dataclasses.Field) -> bool:
    return "Hyper" in str(field.type) or {*get_args(Hyper)} <= {*get_args(field.type)}


def value_at(hyper: Hyper, where: str = "", step: int = 0) -> float | Tensor:
    """What a hyper-parameter is at a step: a number, or a 0-dim tensor as it is, so that nothing waits for its device.

    Raises:
        ValueError: it is neither, and gives neither; ``where`` is what the message begins with.
    """
    value = hyper(step) if callable(hyper) and not isinstance(hyper, Tensor) else hyper
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    if isinstance(value, (int, float)):
        return float(value)
    gives = "" if value is hyper else f" gives {value!r} at step {step}, which"
    raise ValueError(f"{where}{hyper!r}):{gives} must be a number, a 0-dim tensor, or a function of the step that gives one")


def number(hyper: Hyper, where: str = "", step: int = 0) -> float:
    """As ``value_at``, as a plain number, for checks. Waits for the device of a tensor."""
    return float(value_at(hyper, where, step))


def check_positive(rule: Any, name: str, example: str) -> None:
    """Raises ValueError for a field that is not above zero."""
    value, where = getattr(rule, name), f"{type(rule).__name__}({name}="
    if not number(value, where) > 0:
        raise ValueError(f"{where}{value!r}): must be positive, e.g. {example}")


def check_decay(rule: Any, example: str, name: str = "decay") -> None:
    """Raises ValueError for a field that is no weight of an old average."""
    value, where = getattr(rule, name), f"{type(rule).__name__}({name}="
    if not 0 <= number(value, where) < 1:
        raise ValueError(f"{where}{value!r}): the weight of the old average must lie in [0, 1), e.g. {example}")


def check_kl_clip(rule: Any) -> None:
    """Raises ValueError for a bound on all steps together that is neither None nor above zero."""
    if rule.kl_clip is not None:
        check_positive(rule, "kl_clip", "1e-3, or None")


def check_count(rule: Any, name: str, least: int = 1) -> None:
    """Raises ValueError for a field that is no integer of at least ``least``."""
    value = getattr(rule, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{type(rule).__name__}({name}={value!r}): must be an integer of at least {least}")


def weight_of_old(seen: Tensor, decay: Any) -> Tensor:
    """``decay``, or zero where nothing was ``seen`` yet: the first statistic is taken as it is."""
    return torch.where(seen > 0, torch.ones_like(seen) * decay, torch.zeros_like(seen))


def bind(rule: R, values: Mapping[str, Any]) -> R:
    """The rule with ``values`` in the place of fields; unchecked, since tensors in a graph have no value to check."""
    if not values:
        return rule
    bound = object.__new__(type(rule))
    for name in {*vars(rule), *(field.name for field in dataclasses.fields(rule))}:  # type: ignore[arg-type]
        object.__setattr__(bound, name, values[name] if name in values else getattr(rule, name))
    return bound


def timeless(rule: R) -> R:
    """The rule without what differs from step to step and from process to process: a changing field says that it changes."""
    return bind(rule, dict.fromkeys(changing(rule), "changes"))


def describe_rule(rule: Any) -> str:
    """``repr`` of what is alike in every process."""
    return repr(rule if rule is None else timeless(rule))
