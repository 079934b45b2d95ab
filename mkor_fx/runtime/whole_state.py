"""One checkpoint of a compiled step: its model, its optimizers, its factors, its averages."""

from __future__ import annotations

import copy
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
        """A checkpoint of it all: ``{"model", "optimizer", "mkor"}`` and maybe ``"ema"``, each that part's
        ``state_dict()``; of several optimizers a list. ``full``: with owners, what other ranks keep as well; every rank
        must call it."""
        states: Any
        if self.ema is not None:
            self.ema.check_not_applied()
        if isinstance(self.optimizer, Sequence):
            states = [member.state_dict() for member in self.optimizer]
        else:
            states = self.optimizer.state_dict()
        found = {"model": self.model.state_dict(), "optimizer": states, "mkor": self.mkor.state_dict(full=full)}
        return found if self.ema is None else {**found, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take over a ``state_dict()``; the next step is the one that the run before would have taken. A file without
        ``"mkor"`` starts the factors afresh, with a warning.

        Args:
            strict: whether all of model and factors must fit. If not, what fits by name and shape is loaded, the rest
            is warned of.

        Raises:
            ValueError: parts are missing or another model's or optimizer's; names them, and changes nothing.
        """
        _load(self, state, strict)

    def load_checkpoint(self, path: str | PathLike, entry: str | None = None, *, strict: bool = True) -> None:
        """As ``load_state_dict``, of what ``torch.distributed.checkpoint.save(step.state_dict(), checkpoint_id=path)`` has
        written, on any number of ranks and in either placement; ``entry``: that was saved as ``{entry:
        step.state_dict()}``. Every rank must call it.

        Raises:
            ValueError: also where no such checkpoint can be read; says why.
        """
        _load(self, _read(path, entry), strict)


def _read(path: str | PathLike, entry: str | None) -> dict[str, Any]:
    """A checkpoint as ``state_dict`` has made it: its writers know no keys but strings, and leave out what is empty."""
    state = read_all(path)
    if entry is not None:
        if entry not in state:
            raise ValueError(f"{path} holds no {entry!r}; it has {some(sorted(state))}")
        state = state[entry]
    for one in _each(state.get("optimizer", {})):
        named = [key for key in one.get("state", {}) if not key.isdecimal()]
        if named:
            raise ValueError(
                f"{path}: the optimizer's state is by parameter names ({some(named)}), as "
                f"torch.distributed.checkpoint.state_dict "
                "writes it: load that with set_state_dict, and the factors with step.mkor.load_checkpoint"
            )
        one["state"] = {int(number): held for number, held in one.get("state", {}).items()}
    return state


def _each(optimizers: Any) -> list[Any]:
    return list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]


def _load(step: WholeState, state: Mapping[str, Any], strict: bool) -> None:
    """All or nothing: what torch would refuse half way is looked for first."""
    if not isinstance(state, Mapping) or not {"model", "optimizer"} <= set(state):
        has = f"has {some([*map(str, state)])}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
        raise ValueError(
            f"state: must be a dict with model, optimizer and mkor, as step.state_dict() returns it; this one {has}"
        )
    members, optimizers = step.optimizers.members, _each(state["optimizer"])
    if len(optimizers) != len(members):
        raise ValueError(f"the state is of {len(optimizers)} optimizers, the step has {len(members)}")
    for member, one in zip(members, optimizers, strict=True):
        _check_optimizer(member, one)
    weights, odd = _fitting(step.model, state["model"])
    if odd and strict:
        raise ValueError(f"the state is another model's: {some(odd)}. With strict=False what fits is loaded")
    if step.ema is not None:
        step.ema.check_not_applied()
        if "ema" in state:
            step.ema.check(state["ema"])
    if "mkor" in state:
        step.mkor.load_state_dict(state["mkor"], strict=strict)
    else:
        warnings.warn("mkor_fx: the checkpoint has no factors: they start afresh", stacklevel=3)
        step.mkor.reset()
    if odd:
        warnings.warn(f"mkor_fx: of the loaded model {some(odd)}: left out", stacklevel=3)
    step.model.load_state_dict(weights, strict=strict)
    for member, one in zip(members, optimizers, strict=True):
        member.load_state_dict(copy.deepcopy(one))  # torch's optimizers keep the tensors that they are given
    _load_averages(step, state.get("ema"))


def _load_averages(step: WholeState, state: Mapping[str, Tensor] | None) -> None:
    if step.ema is None:
        if state is not None:
            warnings.warn(
                "mkor_fx: the checkpoint has averages of the weights, and this step keeps none "
                "(compile_step(ema=...)): they are "
                "left out", stacklevel=4,
            )  # fmt: skip
    elif state is None:
        warnings.warn("mkor_fx: the checkpoint has no averages of the weights: they start afresh", stacklevel=4)
        step.ema.reset()
    else:
        step.ema.load_state_dict(state)


def _fitting(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of a model's state fits by name and shape, and what is amiss with the rest."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state's model must be a dict of tensors, not a {type(state).__name__}")
    own, fits = model.state_dict(), dict[str, Any]()
    odd = [f"{name} is missing" for name in own if name not in state]
    for name, other in state.items():
        value = own.get(name)
        if name not in own:
            odd.append(f"{name} is not the model's")
        elif isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
            odd.append(f"{name} is {list(other.shape)}, here {list(value.shape)}")
        else:
            fits[name] = other
    return fits, odd


def _check_optimizer(optimizer: Optimizer, state: Any) -> None:
    name = type(optimizer).__name__
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError(f"the state of {name} must be a dict with state and param_groups, as its state_dict() returns it")
    own = [len(group["params"]) for group in optimizer.param_groups]
    other = [len(group["params"]) for group in state["param_groups"]]
    if own != other:
        raise ValueError(f"the state is another optimizer's: groups of {other} parameters, {name} has groups of {own}")
    for mine, its in zip(optimizer.param_groups, state["param_groups"], strict=True):
        missing = sorted(set(optimizer.defaults) & set(mine) - set(its))
        if missing:
            raise ValueError(f"the state is another optimizer's: its groups have no {some(missing)}, which {name} has")
