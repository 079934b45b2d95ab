"""One checkpoint of a compiled step: its model, its optimizers, its factors, its averages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .averages import Averages
from .checkpoint import some
from .distributed_checkpoint import read_all
from .factors import FactorState
from .optimizers import Optimizers


class WholeState:
    """The part of :class:`~mkor_fx.runtime.compiled_step.CompiledStep` that is about files."""

    mkor: FactorState
    ema: Averages | None
    optimizers: Optimizers

    @property
    def model(self) -> nn.Module:
        raise NotImplementedError

    @property
    def optimizer(self) -> Optimizer | Sequence[Optimizer]:
        raise NotImplementedError

    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """A checkpoint of it all: ``{"model", "optimizer", "mkor"}`` and maybe ``"ema"``, each that part's ``state_dict()``; of
        several optimizers a list. ``full``: with owners, what other ranks keep as well; every rank must call it."""
        states: Any
        if isinstance(self.optimizer, Sequence):
            states = [member.state_dict() for member in self.optimizer]
        else:
            states = self.optimizer.state_dict()
        found = {"model": self.model.state_dict(), "optimizer": states, "mkor": self.mkor.state_dict(full=full)}
        return found if self.ema is None else {**found, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a ``state_dict()``; the next step is the one that the run before would have taken. A file without ``"mkor"``
        starts the factors afresh, with a warning.

        Raises:
            ValueError: parts are missing or another model's or optimizer's; names them, and changes nothing.
        """
        _load(self, state, strict)

    def load_checkpoint(self, path: str | PathLike, *, strict: bool = True) -> None:
        """As ``load_state_dict``, of what ``torch.distributed.checkpoint.save(step.state_dict(), checkpoint_id=path)`` has
        written, on any number of ranks and in either placement. Every rank must call it."""
        _load(self, _read(path), strict)


def _read(path: str | PathLike) -> dict[str, Any]:
    """A checkpoint as ``state_dict`` has made it: its writers know no keys but strings, and leave out what is empty."""
    state = read_all(path)
    optimizers = state.get("optimizer", {})
    for one in optimizers if isinstance(optimizers, list) else [optimizers]:
        one["state"] = {int(number): held for number, held in one.get("state", {}).items()}
    return state


def _load(step: WholeState, state: Mapping[str, Any], strict: bool) -> None:
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


def _load_averages(step: WholeState, state: Mapping[str, Tensor] | None) -> None:
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
