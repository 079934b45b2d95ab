"""Factor state of a model, by parameter name."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn


class FactorState:
    """The factors of one model: ``state_dict()`` / ``load_state_dict()``, ``reset()``, ``step``.

    Looked up by parameter identity at every call, so that nothing depends on what a graph was compiled for; the tensors
    follow their parameter's device, and no cast of the model touches them.
    """

    def __init__(
        self, model: nn.Module, refresh_every: int = 1, before_save: Callable[[], None] = lambda: None
    ) -> None:
        self._model, self._refresh_every = model, refresh_every
        self._before_save = before_save
        self._names: dict[int, tuple[str, nn.Parameter]] = {}
        self._factors: dict[str, dict[str, Tensor]] = {}
        self._fresh: dict[str, Callable[[torch.device], dict[str, Tensor]]] = {}
        self._pending: dict[str, Tensor] = {}
        self._step_tensors: dict[torch.device, Tensor] = {}
        self._step = 0
        #: how often the state was replaced from outside, and the step it was then at
        self.generation, self.loaded_step = 0, 0

    # ---- steps ------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps taken with fresh statistics."""
        return self._step

    def advance(self) -> None:
        self._step += 1
        for tensor in self._step_tensors.values():
            tensor.add_(1)

    def step_tensor(self, device: torch.device) -> Tensor:
        """The step count as a 0-dim int64 tensor on ``device``, kept in place."""
        if device not in self._step_tensors:
            self._step_tensors[device] = torch.tensor(self._step, device=device)
        return self._step_tensors[device]

    # ---- factors ----------------------------------------------------------------------------------------------------

    def name(self, param: nn.Parameter) -> str:
        """First name of ``param`` in the model, now or before: sharding wrappers swap parameters in and out.

        Raises:
            ValueError: the model does not own it.
        """
        entry = self._names.get(id(param))
        if entry is None or entry[1] is not param:
            self._names |= {id(p): (name, p) for name, p in self._model.named_parameters()}
            entry = self._names.get(id(param))
        if entry is None:
            raise ValueError(f"a parameter of shape {tuple(param.shape)} is not one of the compiled model's")
        return entry[0]

    def of(self, param: nn.Parameter) -> dict[str, Tensor]:
        """The factors of ``param``, on its device."""
        factors = self._factors[self.name(param)]
        for key, tensor in factors.items():
            if tensor.device != param.device:
                factors[key] = tensor.to(param.device)
        return factors

    def create(self, param: nn.Parameter, fresh: Callable[[torch.device], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The factors of ``param``: those it has, those that were loaded for it, or ``fresh(device)``.

        Raises:
            ValueError: loaded factors do not fit.
        """
        name = self.name(param)
        if name not in self._factors:
            factors = fresh(param.device)
            if self._pending:
                own = {f"{name}.{key}": tensor for key, tensor in factors.items()}
                loaded = {key: t for key, t in self._pending.items() if key.rpartition(".")[0] == name}
                _check_keys_and_shapes(own, loaded)
                for key, tensor in own.items():
                    tensor.copy_(self._pending.pop(key))
            self._factors[name], self._fresh[name] = factors, fresh
        return self.of(param)

    def tensors(self) -> dict[str, Tensor]:
        """The factors themselves, by name."""
        return {f"{name}.{key}": t for name, factors in self._factors.items() for key, t in factors.items()}

    def reset(self) -> None:
        """Forget everything: fresh factors, step 0."""
        for name, fresh in self._fresh.items():
            for key, tensor in fresh(next(iter(self._factors[name].values())).device).items():
                self._factors[name][key].copy_(tensor)
        self._pending.clear()
        self._set_step(0)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model is a plain one."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def metrics(self, per_factor: bool = False) -> dict[str, float]:
        """What can be said of the factors now, as plain numbers. Changes nothing; waits for the device, once.

        ``steps`` and ``refreshes`` so far; ``factor_min`` and ``factor_max``: the extreme diagonal entries of all square
        factors (the largest entry of a positive definite matrix lies there; a ``factor_min`` that is not positive says that
        one is not). ``per_factor`` adds ``"<parameter>.<factor>.min"`` and ``".max"`` of each.
        """
        diagonals = {
            f"{name}.{key}": tensor.detach().diagonal(dim1=-2, dim2=-1)
            for name, factors in self._factors.items()
            for key, tensor in factors.items()
            if tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2]
        }
        found: dict[str, float] = {"steps": self._step, "refreshes": -(-self._step // self._refresh_every)}
        if diagonals:
            ends = [torch.stack([d.amin(), d.amax()]).to(torch.float64) for d in diagonals.values()]
            low, high = torch.stack([e.to(ends[0].device, non_blocking=True) for e in ends]).t().tolist()
            found |= {"factor_min": min(low), "factor_max": max(high)}
            if per_factor:
                for key, least, most in zip(diagonals, low, high):
                    found |= {f"{key}.min": least, f"{key}.max": most}
        return found

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """``{"<parameter>.L": [O, O], "<parameter>.R": [I, I], ..., "step": []}``, copies; plain tensors only."""
        self._before_save()
        state = {key: tensor.clone() for key, tensor in self.tensors().items()}
        state.update({key: tensor.clone() for key, tensor in self._pending.items()})
        return {**state, "step": torch.tensor(self._step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a ``state_dict()`` of the same model. Before the first step it is kept until the factors exist.

        Raises:
            ValueError: keys or shapes are another model's; names them, and changes nothing.
        """
        loaded = {key: tensor for key, tensor in state.items() if key != "step"}
        if "step" not in state:
            raise ValueError("the state has no 'step': it is no mkor_fx state_dict")
        if not loaded and int(state["step"]) == 0:
            return self.reset()
        if self._factors:
            own = self.tensors()
            _check_keys_and_shapes(own, loaded)
            for key, tensor in own.items():
                tensor.copy_(loaded[key])
        else:
            owned = dict(self._model.named_parameters())
            unknown = sorted(key for key in loaded if key.rpartition(".")[0] not in owned)
            if unknown:
                raise ValueError(f"the state is another model's: {_some(unknown)} belong to no parameter of this one")
            unfit = {
                key: f"{key} {tuple(tensor.shape)} for a parameter of {tuple(owned[key.rpartition('.')[0]].shape)}"
                for key, tensor in loaded.items()
                if tensor.dim() == 2 and not _fits(tensor, owned[key.rpartition(".")[0]])
            }
            if unfit:
                raise ValueError(f"the state is another model's: {_some(list(unfit.values()))}")
            self._pending = {key: tensor.clone() for key, tensor in loaded.items()}
        self._set_step(int(state["step"]))

    def load_checkpoint(self, path: str | PathLike, entry: str = "mkor") -> None:
        """Take over a ``state_dict()`` that ``torch.distributed.checkpoint`` has saved under ``{entry: ...}``.

        Written by any number of ranks, for any number; to be called on all of them. What is to be loaded is read from the
        checkpoint, since before the first step no factor exists yet.

        Raises:
            ValueError: the checkpoint has no such entry, or it is another model's.
        """
        from torch.distributed import checkpoint

        reader = checkpoint.FileSystemReader(path)
        metadata = reader.read_metadata()
        state = {}
        for key, place in metadata.planner_data.items():
            if place[0] == entry:
                saved = metadata.state_dict_metadata[key]
                assert isinstance(saved, checkpoint.metadata.TensorStorageMetadata), key
                state[place[1]] = torch.empty(saved.size, dtype=saved.properties.dtype)
        if not state:
            held = sorted({place[0] for place in metadata.planner_data.values()})
            raise ValueError(f"{path} holds no {entry!r}; it has {_some(held)}")
        checkpoint.load({entry: state}, storage_reader=reader)
        self.load_state_dict(state)

    def _set_step(self, step: int) -> None:
        self._step = self.loaded_step = step
        self.generation += 1
        for tensor in self._step_tensors.values():
            tensor.fill_(step)


def state_of(model: nn.Module, mkor: FactorState) -> dict[str, Tensor]:
    """Parameters, buffers and factors by name."""
    factors = {f"factor {key}": tensor for key, tensor in mkor.tensors().items()}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **factors}


def _fits(factor: Tensor, param: Tensor) -> bool:
    """Whether a square factor can belong to a parameter: its side is one of a matrix view's, a bias column more or not."""
    splits = [param.shape[:k].numel() for k in range(param.dim() + 1)]
    sides = {side for rows in splits if rows for side in (rows, param.numel() // rows)}
    return factor.shape[0] == factor.shape[-1] and bool({factor.shape[0], factor.shape[0] - 1} & sides)


def _check_keys_and_shapes(own: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"the state is another model's: missing {_some(missing)}; unexpected {_some(unexpected)}")
    wrong = [
        f"{key}: loaded {tuple(loaded[key].shape)}, here {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if loaded[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the state is another model's: {_some(wrong)}")


def _some(names: list[Any], most: int = 6) -> str:
    shown = ", ".join(map(str, names[:most])) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
