"""The user's torch optimizers as the compiled step sees them: their numbers in one tensor, their state tensors by name."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .counters import counters_of, places, settle_state
from .optimizers import Groups, Optimizers, owner_of
from .packed_numbers import PackedNumbers

#: numbers that torch takes as Python floats only (Muon's polynomial); a change of one compiles again
CONSTANTS = ("ns_coefficients",)


class Number(NamedTuple):
    """A number of ``param_groups[group][key]``; ``position`` inside a tuple such as ``betas``, else None."""

    group: int
    key: str
    position: int | None = None


def numbers_of(optimizer: Groups) -> list[Number]:
    """Every number of the optimizer that may change between steps: floats, tensors and the learning rate."""
    found = []
    for i, group in enumerate(optimizer.param_groups):
        counted = counters_of(owner_of(optimizer, i)).groups
        for key, value in group.items():
            if key in ("params", *CONSTANTS) or _scheduled(key) or key in counted:
                continue
            if _is_number(value) or (key in ("lr", "weight_decay") and isinstance(value, int)):
                found.append(Number(i, key))
            elif isinstance(value, tuple) and value and all(map(_is_number, value)):
                found += [Number(i, key, j) for j in range(len(value))]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1)


def read_number(optimizer: Groups, number: Number) -> float | Tensor:
    return _read(optimizer.param_groups, number)


def _read(groups: list[dict[str, Any]], number: Number) -> float | Tensor:
    value = groups[number.group][number.key]
    return value if number.position is None else value[number.position]


def structure_of(optimizer: Optimizers) -> tuple:
    """What a compiled update depends on beside its numbers: the groups, their flags and constants, and whether there is a
    momentum."""
    numbers = {(n.group, n.key) for n in numbers_of(optimizer)}
    return tuple(
        (
            tuple(id(p) for p in group["params"]),
            type(owner_of(optimizer, i)) is torch.optim.SGD and group["momentum"] != 0,
            group.get("trust"),  # bounds that a rule in front of LAMB keeps as well
            tuple((k, str(v)) for k, v in group.items() if (i, k) not in numbers and _matters(optimizer, i, k)),
        )
        for i, group in enumerate(optimizer.param_groups)
    )


def _matters(optimizer: Optimizers, at: int, key: str) -> bool:
    return key != "params" and not _scheduled(key) and key not in counters_of(owner_of(optimizer, at)).groups


def _scheduled(key: str) -> bool:
    """Left in the groups by torch's schedulers for themselves; the optimizer does not read them."""
    return key in ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")


def tensor_state(optimizer: Optimizers, param: nn.Parameter) -> dict[str, Tensor]:
    """The tensors of the state that is kept for ``param`` by name, in a fixed order."""
    state = optimizer.state_of(param)
    return {key: state[key] for key in sorted(state) if isinstance(state[key], Tensor)}


def counted(optimizers: Optimizers) -> dict[str, Tensor]:
    """The tensors of groups that the optimizers' own steps change, by name."""
    groups = enumerate(optimizers.param_groups)
    held = {f"optimizer {k} of group {i}": g[k] for i, g in groups for k in places(counters_of(owner_of(optimizers, i)), g)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def initialise_state(optimizers: Optimizers, params: list[nn.Parameter]) -> None:
    """Create the state of ``params`` as the first step of the optimizer that holds each would, without stepping.

    Every torch.optim optimizer does so in ``_init_group`` for parameters that have a gradient, pytorch_optimizer's in
    ``init_group``. SGD makes its momentum buffer in the first update; a zero buffer is that update's starting point (see
    ``OptimizerNumbers.update``). Python numbers become tensors; all state goes to its parameter's device: writing step
    counts, which optimizers keep on the host, from there would wait for it. An optimizer without either keeps what it has.
    """
    for optimizer in optimizers.members:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        _initialise(optimizer, [p for p in params if id(p) in held])


def _initialise(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    missing = [p for p in params if not optimizer.state.get(p)] if makes_state(optimizer) else []
    chosen = {id(p) for p in missing}
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if id(p) in chosen]
        if not members:
            continue
        init_group(optimizer, group, members, [torch.zeros_like(p) for p in members])
        if group.get("momentum") and type(optimizer) is torch.optim.SGD:
            for p in members:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for p in params:
        if optimizer.state.get(p):
            settle_state(optimizer, optimizer.state[p], p.device)


def makes_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer can make its state without stepping."""
    return (hasattr(optimizer, "_init_group") or hasattr(optimizer, "init_group")) and not counters_of(optimizer).of_gradient


def init_group(optimizer: Optimizer, group: dict, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """Let an optimizer make what it keeps for some parameters of a group, and in the group, at these gradients."""
    part = {**group, "params": params}
    raw = [p.grad for p in params]
    try:
        for p, grad in zip(params, grads):
            p.grad = grad
        if hasattr(optimizer, "_init_group"):
            collectors = list(inspect.signature(optimizer._init_group).parameters)[1:]
            optimizer._init_group(part, *[[] for _ in collectors])
        else:
            optimizer.init_group(part)  # type: ignore[attr-defined]
    finally:
        for p, grad in zip(params, raw):  # type: ignore[assignment]
            p.grad = grad
    group.update({key: value for key, value in part.items() if key != "params"})


class OptimizerNumbers:
    """All numbers of an optimizer, or of several, in one tensor on a device."""

    def __init__(self, optimizer: Groups, device: torch.device) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._numbers = numbers_of(optimizer)
        self._packed = PackedNumbers(len(self._numbers), device)

    def stale(self, optimizer: Groups, device: torch.device) -> bool:
        """Whether the groups have changed since."""
        return numbers_of(optimizer) != self._numbers or self._packed.tensor.device != device

    def update(self, fresh_groups: Collection[int] = ()) -> Tensor:
        """Take over the optimizer's present numbers.

        SGD's first momentum buffer is the gradient itself: dampening starts one step after a group's buffers are made.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        groups = optimizer.param_groups
        fresh = {at for at in fresh_groups if type(owner_of(optimizer, at)) is torch.optim.SGD}
        return self._packed.write(
            0.0 if n.key == "dampening" and n.group in fresh else _read(groups, n) for n in self._numbers
        )


def groups_of(optimizer: Groups) -> dict[int, int]:
    """The group of each parameter, by identity."""
    return {id(p): at for at, group in enumerate(optimizer.param_groups) for p in group["params"]}


def place_of_rate(optimizer: Groups, at: int) -> tuple[int, int | None, float]:
    """Where a group's learning rate and weight decay lie among the optimizer's numbers, and the sign of its steps."""
    numbers, group = numbers_of(optimizer), optimizer.param_groups[at]
    rate, decay = Number(at, "lr"), Number(at, "weight_decay")
    if rate not in numbers:
        raise ValueError(
            f"a rule whose direction is the step itself needs a learning rate, and group {at} of "
            f"{type(owner_of(optimizer, at)).__name__} has no 'lr'"
        )
    sign = -1.0 if group.get("maximize") else 1.0
    return numbers.index(rate), numbers.index(decay) if decay in numbers else None, sign
