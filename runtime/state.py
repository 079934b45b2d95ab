"""Factor state of a model, by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import check_keys_and_shapes, fits, read_checkpoint, some


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
        #: the rank that keeps a weight's factors, by name; None: every rank. Factors of others, as meta tensors.
        self.owners: dict[str, int | None] = {}
        self._elsewhere: dict[str, Tensor] = {}
        self.ranks: Any = None
        #: what factors will be once everything on its way has arrived, by key
        self.newer: Callable[[], dict[str, Tensor]] = dict
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
                check_keys_and_shapes(own, loaded)
                for key, tensor in own.items():
                    tensor.copy_(self._pending.pop(key))
            self._factors[name], self._fresh[name] = factors, fresh
        return self.of(param)

    def place(
        self,
        owners: Mapping[str, int | None],
        fresh: Mapping[nn.Parameter, Callable[[torch.device], dict[str, Tensor]]],
        rank: int,
    ) -> None:
        """Create, on rank ``rank``, the factors of those parameters that it owns, or that have no owner."""
        for param, make in fresh.items():
            name = self.name(param)
            self.owners[name] = owners[name]
            if owners[name] in (None, rank):
                self.create(param, make)
            else:
                others = {f"{name}.{key}": t for key, t in make(torch.device("meta")).items()}
                loaded = {key: self._pending.pop(key) for key in [*self._pending] if key.rpartition(".")[0] == name}
                if loaded:
                    check_keys_and_shapes(others, loaded)
                self._elsewhere |= others

    def holds(self, param: nn.Parameter) -> bool:
        """Whether this process has factors of ``param``."""
        return self.name(param) in self._factors

    def replicated(self) -> dict[str, Tensor]:
        """The factors that every rank has, by name."""
        return {key: t for key, t in self.tensors().items() if self._owner(key) is None}

    def tensors(self) -> dict[str, Tensor]:
        """The factors themselves, by name; of those that have an owner, this rank's own."""
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

    def state_dict(self, *, full: bool = False) -> dict[str, Tensor]:
        """``{"<parameter>.L": [O, O], "<parameter>.R": [I, I], ..., "step": []}``, copies; plain tensors only.

        With owners it is this rank's part: what ``torch.distributed.checkpoint`` saves of all ranks together is the whole.
        ``full=True`` fetches the rest, for ``torch.save``: every rank must call it, and gets the same.
        """
        self._before_save()
        state = {key: tensor.clone() for key, tensor in {**self.tensors(), **self.newer(), **self._pending}.items()}
        if full:
            everywhere = {**self._elsewhere, **state}
            owners = {key: owner for key in everywhere if (owner := self._owner(key)) is not None}
            if owners:
                device = next(self._model.parameters()).device
                state |= self.ranks.from_owners(everywhere, owners, device)
        return {**state, "step": torch.tensor(self._step)}

    def _owner(self, key: str) -> int | None:
        return self.owners.get(key.rpartition(".")[0])

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a ``state_dict()`` of the same model. Before the first step it is kept until the factors exist.

        With owners: a full one, or this rank's part.

        Raises:
            ValueError: keys or shapes are another model's; names them, and changes nothing.
        """
        loaded = {key: tensor for key, tensor in state.items() if key != "step"}
        if "step" not in state:
            raise ValueError("the state has no 'step': it is no mkor_fx state_dict")
        if not loaded and int(state["step"]) == 0:
            return self.reset()
        if self._factors or self._elsewhere:
            own = self.tensors()
            others = {key: tensor for key, tensor in self._elsewhere.items() if key in loaded}
            check_keys_and_shapes({**own, **others}, loaded)
            for key, tensor in own.items():
                tensor.copy_(loaded[key])
        else:
            owned = dict(self._model.named_parameters())
            unknown = sorted(key for key in loaded if key.rpartition(".")[0] not in owned)
            if unknown:
                raise ValueError(f"the state is another model's: {some(unknown)} belong to no parameter of this one")
            unfit = {
                key: f"{key} {tuple(tensor.shape)} for a parameter of {tuple(owned[key.rpartition('.')[0]].shape)}"
                for key, tensor in loaded.items()
                if tensor.dim() == 2 and not fits(tensor, owned[key.rpartition(".")[0]])
            }
            if unfit:
                raise ValueError(f"the state is another model's: {some(list(unfit.values()))}")
            self._pending = {key: tensor.clone() for key, tensor in loaded.items()}
        self._set_step(int(state["step"]))

    def load_checkpoint(self, path: str | PathLike, entry: str = "mkor") -> None:
        """Take over a ``state_dict()`` that ``torch.distributed.checkpoint`` has saved under ``{entry: ...}``.

        Written by any number of ranks, for any number; to be called on all of them. What is to be loaded is read from the
        checkpoint, since before the first step no factor exists yet. With owners each rank reads its own part; before the
        first step, when it is not known whose is what, everything.

        Raises:
            ValueError: the checkpoint has no such entry, or it is another model's.
        """
        own = {*self.tensors(), "step"}
        self.load_state_dict(read_checkpoint(path, entry, own if len(own) > 1 else None))

    def _set_step(self, step: int) -> None:
        self._step = self.loaded_step = step
        self.generation += 1
        for tensor in self._step_tensors.values():
            tensor.fill_(step)


def state_of(model: nn.Module, mkor: FactorState) -> dict[str, Tensor]:
    """What all ranks have alike, by name: parameters, buffers, factors without an owner."""
    factors = {f"factor {key}": tensor for key, tensor in mkor.replicated().items()}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **factors}
