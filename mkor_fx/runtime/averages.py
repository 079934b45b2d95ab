"""Exponential moving averages of weights, which a compiled step keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .checkpoint import some

_COUNT = "steps"  # no parameter's name alone: those of a state begin with "average."


def dtype_of_average(dtype: torch.dtype) -> torch.dtype:
    """In half precision an average would not move: ``1 - ema`` is less than a rounding."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class Averages:
    """``step.ema``: averages of the weights that a step trains; what it does not train is its own average.

    Attributes:
        decay: ``d`` of ``A <- d A + (1 - d) W``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self.decay = model, decay
        self._held: dict[str, Tensor] = {}
        self._count: Tensor | None = None
        self._applied = False

    def __repr__(self) -> str:
        return f"Averages(decay={self.decay}, {len(self._held)} weights)"

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model is a plain one."""

    # ---- what programs ask for ------------------------------------------------------------------------------------------

    def of(self, name: str, param: Tensor) -> Tensor:
        """The average of a weight, made of it as it is where there is none that fits."""
        held, dtype = self._held.get(name), dtype_of_average(param.dtype)
        if held is None or held.shape != param.shape or held.dtype != dtype:
            held = self._held[name] = param.detach().to(dtype, copy=True)
        elif held.device != param.device:
            held = self._held[name] = held.to(param.device)
        return held

    def count(self, device: torch.device) -> Tensor:
        """Steps that are in the averages, 0-dim int64."""
        if self._count is None or self._count.device != device:
            self._count = torch.tensor(self.steps, device=device)
        return self._count

    def check_not_applied(self) -> None:
        """Raises RuntimeError where a step would train the averages."""
        if self._applied:
            raise RuntimeError("the model has its averages (step.ema.applied()): leave that block before the next step")

    # ---- what users ask for ---------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps that are in the averages. Waits for the device."""
        return 0 if self._count is None else int(self._count)

    def weights(self) -> dict[str, Tensor]:
        """The live averages by parameter name, in float32 at least."""
        return dict(self._held)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with its averages in place of its weights; these come back at the end. No step in between.

        Raises:
            RuntimeError: they are in place already.
        """
        if self._applied:
            raise RuntimeError("the averages are in the model already: step.ema.applied() does not nest")
        own = {name: p for name, p in self._model.named_parameters() if name in self._held}
        weights = {name: p.detach().clone() for name, p in own.items()}
        self._applied = True
        try:
            self._write(own, self._held)
            yield self._model
        finally:
            self._write(own, weights)
            self._applied = False

    @staticmethod
    @torch.no_grad()
    def _write(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, param in params.items():
            param.copy_(values[name])

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """``{"average.<parameter>": tensor, "steps": 0-dim int64}``; the tensors are live."""
        count = torch.tensor(0) if self._count is None else self._count
        return {_COUNT: count, **{f"average.{name}": tensor for name, tensor in self._held.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ``state_dict()``.

        Raises:
            ValueError: an average is missing its weight, or shaped otherwise; names it, and changes nothing.
        """
        self.check(state)
        own = dict(self._model.named_parameters())
        given = {name.removeprefix("average."): tensor for name, tensor in state.items() if name != _COUNT}
        self._held = {}
        for name, tensor in given.items():
            param = own[name]
            self._held[name] = tensor.detach().to(param.device, dtype_of_average(param.dtype), copy=True)
        device = next(iter(own.values())).device
        self._count = torch.tensor(int(state[_COUNT]), device=device)

    def check(self, state: Mapping[str, Tensor]) -> None:
        """As ``load_state_dict`` would refuse it."""
        if not isinstance(state, Mapping) or _COUNT not in state:
            raise ValueError("the averages' state must be a dict as step.ema.state_dict() returns it")
        own, odd = dict(self._model.named_parameters()), []
        for key, tensor in state.items():
            name = key.removeprefix("average.")
            if key == _COUNT:
                continue
            if name not in own or name == key:
                odd.append(f"{key} is no weight's")
            elif tensor.shape != own[name].shape:
                odd.append(f"{key} is {list(tensor.shape)}, the weight {list(own[name].shape)}")
        if odd:
            raise ValueError(f"the averages are another model's: {some(odd)}")

    def reset(self) -> None:
        """Start afresh, at the weights behind the next step."""
        self._held, self._count = {}, None
