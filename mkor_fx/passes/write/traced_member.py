"""One optimizer while its step is traced: the copy that is stepped, what stands for its numbers, what it does to them."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...runtime.counters import counters_of, is_python_number, places
from ...runtime.optimizer_state import Number
from ..torch_api.tracing import shaped_like
from .python_numbers import PythonNumber, PythonNumbers
from .what_a_step_changes import changed, own_copy
from .without_host import Refused

#: group options that choose between implementations of one update; the traced one is the plain loop
IMPLEMENTATION = {"foreach": False, "fused": False, "capturable": True, "differentiable": False}


@dataclass
class Findings:
    """What a trace has found an optimizer to do that a program would not: by optimizer's name, in words for the user.

    ``late`` is state that its step creates, ``hidden`` what it changes besides tensors of its state; of these ``counters``
    are the keys of groups whose numbers could be state, with the type that the optimizer has there. ``of_gradient``: whose
    state is made of more than parameters; ``idle``: who changes no weight."""

    late: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    hidden: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counters: dict[Optimizer, dict[str, type]] = field(default_factory=lambda: defaultdict(dict))
    of_gradient: set[Optimizer] = field(default_factory=set)
    idle: list[str] = field(default_factory=list)


def stand_in(
    optimizer: Optimizer, params: Sequence[nn.Parameter], stands_for: dict[int, Tensor], tensors: Callable = shaped_like
) -> Optimizer:
    """A copy over other tensors; what it holds besides is made by ``tensors`` of the optimizer's."""
    clone = _bare(optimizer, tensors)
    clone.param_groups = [
        {key: own_copy(value, tensors) for key, value in group.items() if key != "params"}
        | {"params": [stands_for[id(p)] for p in group["params"] if id(p) in stands_for]}
        for group in optimizer.param_groups
    ]
    for p in params:
        if p in optimizer.state:
            clone.state[stands_for[id(p)]] = {key: own_copy(value, tensors) for key, value in optimizer.state[p].items()}
    known, own = counters_of(clone), counters_of(optimizer)
    known.groups.update(own.groups)
    known.state.update(own.state)
    known.of_gradient = own.of_gradient
    return clone


def _bare(optimizer: Optimizer, tensors: Callable) -> Optimizer:
    """An optimizer of the same class and attributes, whose state is empty."""
    clone = object.__new__(type(optimizer))
    attributes = {k: own_copy(v, tensors) for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    for key, value in attributes.items():
        if isinstance(value, types.MethodType) and value.__self__ is optimizer:
            attributes[key] = types.MethodType(value.__func__, clone)
    vars(clone).update(attributes | {key: value for key, value in IMPLEMENTATION.items() if key in attributes})
    vars(clone)["state"] = defaultdict(dict)
    return clone


@dataclass
class Member:
    """One optimizer while it is traced: what stands for its numbers, and what it does to them."""

    optimizer: Optimizer
    begin: int
    begun: Optimizer
    mode: PythonNumbers
    found: Findings

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    def own_positions(self, positions: dict[int, int]) -> list[list[int]]:
        return [[positions[id(p)] for p in group["params"] if id(p) in positions] for group in self.optimizer.param_groups]

    def clone(
        self, params: list[list[Tensor]], entries: dict[Number, Tensor], counters: dict, counts: Mapping[Number, float]
    ) -> Optimizer:
        """The optimizer over traced tensors, its numbers 0-dim ones; ``counts`` are what its counters stand at."""
        clone, known = _bare(self.optimizer, self.mode.hold), counters_of(self.optimizer)
        clone.param_groups = [
            _group_on_tensors(group, self.begin + i, entries, params[i]) for i, group in enumerate(self.begun.param_groups)
        ]
        for i, group in enumerate(clone.param_groups):
            for key in places(known, group):
                held, number = counters[self.begin + i, key], Number(self.begin + i, key)
                group[key] = held.clone() if known.groups[key] is Tensor else self._number(held, key, number, counts[number])
        return clone

    def watch_init(self, clone: Optimizer) -> None:
        """State whose making is passed more than the group cannot be made before."""
        if not hasattr(type(clone), "init_group"):
            return

        def init_group(group: dict, *args: Any, **kwargs: Any) -> None:
            if args or kwargs:
                self.found.of_gradient.add(self.optimizer)
            type(clone).init_group(clone, group, *args, **kwargs)  # type: ignore[attr-defined]

        vars(clone)["init_group"] = init_group

    def state(self, begun: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        numbers = counters_of(self.optimizer).state.keys() | counters_of(self.begun).state.keys()
        shown = {k: self._number(t, k) if k in numbers else t for k, t in tensors.items()}
        return {**begun, **shown}

    def _number(self, held: Tensor, key: str, number: Number | None = None, value: float | None = None) -> Tensor:
        shown = held.to(torch.float64, copy=True)
        self.mode.add(PythonNumber(shown, number, value, counts=number is not None, origin=f"its own {key!r}"))
        return shown

    def note(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """What has changed without a program's seeing it."""
        known = counters_of(self.optimizer)
        numbers = known.state.keys() | counters_of(self.begun).state.keys()
        for place in changed(before, after):
            if place.key in (numbers if place.of_state else known.groups):
                continue
            if place not in before and (place.of_state or place.group is not None):
                self.found.late[self.name].append(place.key)
            else:
                self._note_hidden(place.name, place.key, place.group)
        for n in self.mode.written:
            self._note_hidden(f"param_groups[{n.group - self.begin}][{n.key!r}]", n.key, n.group - self.begin)

    def _note_hidden(self, place: str, key: str, group: int | None) -> None:
        self.found.hidden[self.name].append(place)
        if group is None or key in ("lr", "weight_decay"):
            return
        value = self.optimizer.param_groups[group].get(key, self.begun.param_groups[group].get(key))
        if is_python_number(value) or (isinstance(value, Tensor) and value.numel() == 1):
            self.found.counters[self.optimizer][key] = Tensor if isinstance(value, Tensor) else type(value)

    def new_counters(self, clone: Optimizer, counters: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
        groups = dict(enumerate(clone.param_groups, start=self.begin))
        return {
            (at, key): self._kept(groups[at][key], held, f"param_groups[{at - self.begin}][{key!r}]")
            for (at, key), held in counters.items()
            if at in groups
        }

    def next_counts(self, clone: Optimizer) -> dict[Number, Any]:
        """What its counters become, computed from numbers alone; None where only the device knows."""
        found = {}
        for i, group in enumerate(clone.param_groups):
            for key in places(counters_of(self.optimizer), group):
                known = self.mode.of(group[key])
                number = group[key] if is_python_number(group[key]) else known and known.expression
                found[Number(self.begin + i, key)] = number
        return found

    def new_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        if made := [k for k, v in state.items() if k not in tensors and isinstance(v, Tensor)]:
            self.found.late[self.name] += made
        return {k: self._kept(state[k], held, f"its state's {k!r}") for k, held in tensors.items()}

    def _kept(self, value: Any, held: Tensor, place: str) -> Tensor:
        """A new value as it is kept."""
        if is_python_number(value):
            return torch.full_like(held, value)
        if not isinstance(value, Tensor) or value.shape != held.shape:
            raise Refused(f"{place} becomes {tuple(value.shape) if isinstance(value, Tensor) else repr(value)}")
        return value if self.mode.of(value) is None else value.to(held.dtype)


def _group_on_tensors(group: dict, index: int, entries: dict[Number, Tensor], params: list[Tensor]) -> dict:
    replaced = {key: own_copy(value, lambda tensor: tensor) for key, value in group.items() if key != "params"}
    replaced["params"] = params
    replaced.update({k: v for k, v in IMPLEMENTATION.items() if k in group})
    for number, tensor in entries.items():
        if number.group != index:
            continue
        if number.position is None:
            replaced[number.key] = tensor
        else:
            values = list(replaced[number.key])
            values[number.position] = tensor
            replaced[number.key] = tuple(values)
    return replaced
