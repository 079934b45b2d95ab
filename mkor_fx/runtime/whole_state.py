"""One checkpoint of a compiled step: its model, its optimizers, its factors, its averages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import some


def saved(step: Any, full: bool) -> dict[str, Any]:
    optimizer, states = step.optimizer, None
    if isinstance(optimizer, Sequence):
        states = [member.state_dict() for member in optimizer]
    else:
        states = optimizer.state_dict()
    found = {"model": step.model.state_dict(), "optimizer": states, "mkor": step.mkor.state_dict(full=full)}
    return found if step.ema is None else {**found, "ema": step.ema.state_dict()}


def load(step: Any, state: Mapping[str, Any], strict: bool) -> None:
    """All or nothing: what torch would refuse half way is looked for first."""
    if not isinstance(state, Mapping) or not {"model", "optimizer"} <= set(state):
        has = f"has {some([*map(str, state)])}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
        raise ValueError(
            f"state: must be a dict with model, optimizer and mkor, as step.state_dict() returns it; this one {has}"
        )
    members = step.optimizers.members
    optimizers = state["optimizer"] if isinstance(state["optimizer"], Sequence) else [state["optimizer"]]
    if len(optimizers) != len(members):
        raise ValueError(f"the state is of {len(optimizers)} optimizers, the step has {len(members)}")
    for member, one in zip(members, optimizers, strict=True):
        _check_optimizer(member, one)
    if strict:
        _check_model(step.model, state["model"])
    if step.ema is not None:
        step.ema.check_not_applied()
        if "ema" in state:
            step.ema.check(state["ema"])
    if "mkor" in state:
        step.mkor.load_state_dict(state["mkor"], strict=strict)
    else:
        warnings.warn("mkor_fx: the checkpoint has no factors: they start afresh", stacklevel=3)
        step.mkor.reset()
    step.model.load_state_dict(state["model"], strict=strict)
    for member, one in zip(members, optimizers, strict=True):
        member.load_state_dict(one)
    _load_averages(step, state.get("ema"))


def _load_averages(step: Any, state: Mapping[str, Tensor] | None) -> None:
    if step.ema is None:
        if state is not None:
            warnings.warn(
                "mkor_fx: the checkpoint has averages of the weights, and this step keeps none (compile_step(ema=...)): they are "
                "left out", stacklevel=4,
            )  # fmt: skip
    elif state is None:
        warnings.warn("mkor_fx: the checkpoint has no averages of the weights: they start afresh", stacklevel=4)
        step.ema.reset()
    else:
        step.ema.load_state_dict(state)


def _check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    odd = [f"{name} is missing" for name in own if name not in state]
    odd += [f"{name} is not the model's" for name in state if name not in own]
    for name, value in own.items():
        other = state.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
            odd.append(f"{name} is {list(other.shape)}, here {list(value.shape)}")
    if odd:
        raise ValueError(f"the state is another model's: {some(odd)}. With strict=False what fits is loaded")


def _check_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    own = [len(group["params"]) for group in optimizer.param_groups]
    other = [len(group["params"]) for group in state.get("param_groups", ())]
    if own != other:
        raise ValueError(
            f"the state is another optimizer's: groups of {other} parameters, {type(optimizer).__name__} has groups of {own}"
        )
