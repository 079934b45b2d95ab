"""Exponential moving averages of weights, which a compiled step keeps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import some

_COUNT = "steps"  # no parameter's name alone: those of a state begin with "average."


def dtype_of_average(dtype: torch.dtype) -> torch.dtype:
    """In half precision an average would not move: ``1 - ema`` is less than a rounding."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class Averages:
    """``step.ema``: averages of the weights that a step has trained, as ``torch.optim.swa_utils.AveragedModel`` has
    them; what it has never trained is its own average."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._held: dict[str, Tensor] = {}
        #: whose averages these are; a loaded one is of whatever weight has its name
        self._owners: dict[str, weakref.ref[Tensor]] = {}
        #: of weights that are not trained for now: how many steps there were when they last were
        self._behind: dict[str, Tensor] = {}
        self._trained: frozenset[str] = frozenset()
        self._count: Tensor | None = None
        self._applied = False

    def __repr__(self) -> str:
        return f"Averages(decay={self.decay}, {len(self._held)} weights)"

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError("averages belong to their step and cannot be copied: keep copy.deepcopy(step.ema.state_dict())")

    # ---- what programs ask for ------------------------------------------------------------------------------------------

    def of(self, name: str, param: Tensor) -> Tensor:
        """The average of a weight, made of it as it is where there is none that fits."""
        held, dtype = self._held.get(name), dtype_of_average(param.dtype)
        if held is None or held.shape != param.shape or held.dtype != dtype:
            held = self._held[name] = param.detach().to(dtype, copy=True)
        elif held.device != param.device:
            held = self._held[name] = held.to(param.device)
        self._owners[name] = weakref.ref(param)
        return held

    def count(self, device: torch.device) -> Tensor:
        """Steps that are in the averages, 0-dim int64."""
        if self._count is None or self._count.device != device:
            self._count = torch.tensor(self.steps, device=device)
        return self._count

    def trains(self, names: frozenset[str]) -> None:
        """A step trains these weights. The averages of others stand still meanwhile, and are brought up to date when
        somebody asks: ``n`` steps later that of a weight that has not changed is ``W + d^n (A - W)``."""
        if names == self._trained:
            return
        if self._count is not None:
            for name in self._trained - names:
                self._behind[name] = self._count.clone()
        for name in names & self._behind.keys():
            self._catch_up(name)
            del self._behind[name]
        self._trained = names

    def forget_gone(self) -> None:
        """The model has changed: averages of weights that are not there any more, or are others now, are dropped."""
        own = dict(self._model.named_parameters())
        others = [name for name, owner in self._owners.items() if name in own and owner() is not own[name]]
        for name in [*others, *(name for name in self._held if name not in own)]:
            for held in (self._held, self._owners, self._behind):
                held.pop(name, None)
        self._trained = self._trained & self._held.keys()
        if others:
            said = f"mkor_fx: averages that start afresh, of weights that are others than before: {some(others)}"
            warnings.warn(said, stacklevel=4)

    def check_not_applied(self) -> None:
        """Raises RuntimeError where the model has its averages in place of its weights."""
        if self._applied:
            raise RuntimeError("the model has its averages (step.ema.applied()): leave that block first")

    # ---- what users ask for ---------------------------------------------------------------------------------------------

    @property
    def decay(self) -> float:
        """``d`` of ``A <- d A + (1 - d) W``."""
        return self._decay

    @property
    def steps(self) -> int:
        """Steps that are in the averages. Waits for the device."""
        return 0 if self._count is None else int(self._count)

    def weights(self) -> dict[str, Tensor]:
        """The live averages by parameter name, in float32 at least."""
        for name in self._behind:
            self._catch_up(name)
        return dict(self._held)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with its averages in place of its weights; these come back at the end. No step in between.

        Raises:
            RuntimeError: they are in place already.
        """
        if self._applied:
            raise RuntimeError("the averages are in the model already: step.ema.applied() does not nest")
        averages = self.weights()
        own = {name: p for name, p in self._model.named_parameters() if self._is_of(name, p)}
        weights = {name: p.detach().clone() for name, p in own.items()}
        self._applied = True
        try:
            self._write(own, averages)
            yield self._model
        finally:
            self._write(own, weights)
            self._applied = False

    def _is_of(self, name: str, param: Tensor) -> bool:
        owner = self._owners.get(name)
        return name in self._held and (owner() is param if owner is not None else self._held[name].shape == param.shape)

    @torch.no_grad()
    def _catch_up(self, name: str) -> None:
        owner = self._owners.get(name)
        param = None if owner is None else owner()
        if param is None or self._count is None:
            return
        held, missed = self._held[name], self._count - self._behind[name]
        weight = param.detach().to(held.dtype)
        later = weight + self.decay ** missed.to(held.dtype) * (held - weight)
        held.copy_(torch.where(missed > 0, later, held))
        self._behind[name] = self._count.clone()

    @staticmethod
    @torch.no_grad()
    def _write(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, param in params.items():
            param.copy_(values[name])

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """``{"average.<parameter>": tensor, "steps": 0-dim int64}``; the tensors are live."""
        count = torch.tensor(0) if self._count is None else self._count
        return {_COUNT: count, **{f"average.{name}": tensor for name, tensor in self.weights().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ``state_dict()``.

        Raises:
            ValueError: it is none, an average is of no weight or of another shape, or one is missing; names it, and changes
                nothing.
        """
        self.check(state)
        own = dict(self._model.named_parameters())
        given = {name.removeprefix("average."): tensor for name, tensor in state.items() if name != _COUNT}
        self.reset()
        for name, tensor in given.items():
            param = own[name]
            self._held[name] = tensor.detach().to(param.device, dtype_of_average(param.dtype), copy=True)
            self._owners[name] = weakref.ref(param)
        self._count = torch.tensor(int(state[_COUNT]), device=next(iter(own.values())).device)
        self._behind = {name: self._count.clone() for name in given}  # until the next step says which it trains

    def check(self, state: Mapping[str, Tensor]) -> None:
        """As ``load_state_dict`` would refuse it."""
        if not isinstance(state, Mapping) or _COUNT not in state:
            raise ValueError("the averages' state must be a dict as step.ema.state_dict() returns it")
        own, odd = dict(self._model.named_parameters()), []
        for key, tensor in state.items():
            name = key.removeprefix("average.")
            if not isinstance(tensor, Tensor):
                odd.append(f"{key} is a {type(tensor).__name__} and no tensor")
            elif key != _COUNT and (name not in own or name == key):
                odd.append(f"{key} is no weight's")
            elif key != _COUNT and tensor.shape != own[name].shape:
                odd.append(f"{key} is {list(tensor.shape)}, the weight {list(own[name].shape)}")
        begun = not odd and int(state[_COUNT]) > 0
        known = self._held or ({name for name, p in own.items() if p.requires_grad} if len(state) == 1 else {})
        odd += [f"average.{name} is missing" for name in known if begun and f"average.{name}" not in state]
        if odd:
            raise ValueError(f"the averages are another model's: {some(odd)}")

    def reset(self) -> None:
        """Start afresh, at the weights behind the next step."""
        self._held, self._owners, self._behind, self._trained, self._count = {}, {}, {}, frozenset(), None
