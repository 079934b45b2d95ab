"""Factors in files: what is saved, and whether what is loaded fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .distributed_checkpoint import read_entry

#: in front of the name of a weight whose state waits to be derived from
PUT_BY = "put_by:"
#: beside the tensors of such a state: whether its step was taken, and which that was. No rule's names, which may be any
#: without dots
TAKEN, OPENED = ":taken", ":opened"
#: state tensors of one weight, by name
Group = dict[str, Tensor]


class Recipe(Protocol):
    """What makes the state of one weight, and knows what is in it."""

    def fresh_state(self, device: torch.device) -> Group: ...

    def kind(self, key: str) -> Any: ...


class Saved:
    """The part of :class:`~mkor_fx.runtime.factors.FactorState` that is about files."""

    _model: nn.Module
    _factors: dict[str, Group]
    _elsewhere: dict[str, Group]
    _pending: dict[str, Group]
    put_by: dict[str, Group]
    _afresh: dict[str, str]
    _strict: bool
    _step: int
    _step_tensors: dict[torch.device, Tensor]
    _expect: Callable[[str, nn.Parameter], list[Group]]
    owners: dict[str, int | None]
    ranks: Any
    switch: Any
    newer: Callable[[], dict[str, Tensor]]
    generation: int
    loaded_step: int

    @property
    def step(self) -> int:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def _start_afresh(self, name: str) -> None:
        raise NotImplementedError

    def state_dict(self, *, full: bool = False) -> dict[str, Tensor]:
        """``{"<parameter>.L": [O, O], "<parameter>.R": [I, I], ..., "step": []}``, copies; plain tensors only. Under a
        ``Hybrid`` also ``"switch"``, where it stands; with ``derive="spread"`` what states were that wait to be derived
        from, as
        ``"put_by:<parameter>.L"``.

        With owners it is this rank's part: what ``torch.distributed.checkpoint`` saves of all ranks together is the whole.
        ``full=True`` fetches the rest, for ``torch.save``: every rank must call it, and gets the same.
        """
        live = {**self.tensors(), **self.newer(), **flat(self._pending)}
        waiting = flat({f"{PUT_BY}{name}": group for name, group in self.put_by.items()})
        state = {key: tensor.clone() for key, tensor in live.items()}
        if full:
            everywhere = {**flat(self._elsewhere), **state}
            owners = {key: owner for key in everywhere if (owner := self._owner(key)) is not None}
            if owners:
                device = next(self._model.parameters()).device
                state |= self.ranks.from_owners(everywhere, owners, device)
                waiting = self.ranks.united(waiting)
        switch = {} if self.switch is None else {"switch": self.switch.state()}
        waiting = {key: tensor.clone() for key, tensor in waiting.items()}
        return {**state, **waiting, **switch, "step": torch.tensor(self.step)}

    def _owner(self, key: str) -> int | None:
        return self.owners.get(key.rpartition(".")[0])

    def load_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> list[str]:
        """Take over a ``state_dict()`` of the same model. Before the first step it is kept until the factors exist.

        With owners: a full one, or this rank's part. A weight of which the state has nothing starts afresh.

        Args:
            strict: whether all of the state must fit. If not, what fits by name and shape is loaded, and the rest is left.

        Returns:
            The keys that were left, which are also warned of.

        Raises:
            ValueError: keys or shapes are another model's; names them, and changes nothing.
        """
        loaded, step = by_weight(state)
        switch = loaded.get("", {}).pop("switch", None)
        if loaded.get("") == {}:
            del loaded[""]
        waiting = {name: loaded.pop(name) for name in [*loaded] if name.startswith(PUT_BY)}
        if not loaded and step == 0:
            self.reset()
            return []
        misfits = {name: why for name, group in loaded.items() if (why := self._misfit(name, group))}
        misfits |= {name: why for name, group in waiting.items() if (why := _unlike_its_state(name, group, loaded))}
        if misfits and strict:
            raise ValueError(
                f"the state is another model's: {some(list(misfits.values()))}. With strict=False what fits is loaded"
            )
        left = [f"{name}.{key}" for name in misfits for key in {**loaded, **waiting}[name]]
        loaded, waiting = ({n: group for n, group in one.items() if n not in misfits} for one in (loaded, waiting))
        if left:
            warnings.warn(f"mkor_fx: of the loaded state {some(list(misfits.values()))} was left out", stacklevel=2)
        if self.switch is not None:
            self.switch.reset() if switch is None else self.switch.load(switch)
        self._strict = strict
        self._set_step(step)
        self._afresh = {name: "the loaded state has none" for name in self._factors if name not in loaded}
        self._pending = {}
        for name, group in loaded.items():
            if name in self._factors:
                for key, tensor in group.items():
                    self._factors[name][key].copy_(tensor)
            elif name not in self._elsewhere:
                self._pending[name] = {key: tensor.clone() for key, tensor in group.items()}
        for name in self._afresh:
            self._start_afresh(name)
        held = {name.removeprefix(PUT_BY): group for name, group in waiting.items()}
        self.put_by = {
            name: {key: tensor.clone() for key, tensor in group.items()}
            for name, group in held.items()
            if name in loaded and name not in self._elsewhere
        }
        return left

    def _misfit(self, name: str, group: Group) -> str | None:
        """Why loaded factors cannot be those of a weight; None if they may be."""
        known = self._factors.get(name, self._elsewhere.get(name))
        if known is not None:
            return None if same_shapes(known, group) else unlike(name, group, known)
        owned = dict(self._model.named_parameters())
        if name not in owned:
            return f"{_keys(name, group)} belong to no parameter of this one"
        possible = self._expect(name, owned[name])
        if not possible or any(same_shapes(other, group) or _is_batch_of(other, group) for other in possible):
            return None
        return unlike(name, group, possible[0])

    def load_checkpoint(self, path: str | PathLike, entry: str = "mkor", *, strict: bool = True) -> list[str]:
        """Take over a ``state_dict()`` that ``torch.distributed.checkpoint`` has saved under ``{entry: ...}``.

        Written by any number of ranks, for any number; to be called on all of them. What is to be loaded is read from the
        checkpoint, since before the first step no factor exists yet. With owners each rank reads its own part; before the
        first step, when it is not known whose is what, everything.

        Raises:
            ValueError: the checkpoint has no such entry, or it is another model's.
        """
        own = {*self.tensors(), "step", "switch"} if self.tensors() else None
        is_own = lambda key: own is None or key in own or key.removeprefix(PUT_BY).rpartition(".")[0] in self._factors
        return self.load_state_dict(read_entry(path, entry, is_own), strict=strict)

    def _set_step(self, step: int) -> None:
        self._step = self.loaded_step = step
        self.generation += 1
        for tensor in self._step_tensors.values():
            tensor.fill_(step)


def flat(groups: Mapping[str, Group]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, group in groups.items() for key, tensor in group.items()}


def by_weight(state: Mapping[str, Tensor]) -> tuple[dict[str, Group], int]:
    """A state by weight, and its step.

    Raises:
        ValueError: it is no state of factors.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state={state!r}: must be a dict of tensors, as state_dict() returns it")
    if "step" not in state:
        raise ValueError("the state has no 'step': it is no mkor_fx state_dict")
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"the state holds {some(odd)}, which are no tensors: it is no mkor_fx state_dict")
    groups: dict[str, Group] = {}
    for key, tensor in state.items():
        if key != "step":
            name, _, entry = key.rpartition(".")
            groups.setdefault(name, {})[entry] = tensor
    return groups, int(state["step"])


def same_shapes(one: Group, other: Group) -> bool:
    return one.keys() == other.keys() and all(t.shape == other[key].shape for key, t in one.items())


def _unlike_its_state(name: str, waiting: Group, loaded: Mapping[str, Group]) -> str | None:
    """Why what waits to be derived from cannot be what a loaded state was."""
    state = loaded.get(name.removeprefix(PUT_BY))
    if state is None:
        return f"{_keys(name, waiting)} without the state of that weight"
    if not {TAKEN, OPENED} <= waiting.keys():
        return f"{_keys(name, waiting)} without the step that it is of"
    own = {key: t for key, t in waiting.items() if key not in (TAKEN, OPENED)}
    odd = {key: t for key, t in own.items() if key not in state or t.shape != state[key].shape}
    return f"{_keys(name, odd)} not shaped as its state" if odd else None


def _is_batch_of(one: Group, many: Group) -> bool:
    """Whether ``many`` could be the states of several matrices, each like ``one``'s in the number of dimensions."""
    return one.keys() == many.keys() and all(many[key].dim() == t.dim() + 1 for key, t in one.items())


def unlike(name: str, loaded: Group, here: Group) -> str:
    """In what a loaded group differs from the one that there is."""
    told = [f"missing {name}.{key}" for key in here if key not in loaded]
    told += [f"unexpected {name}.{key}" for key in loaded if key not in here]
    for key in here.keys() & loaded.keys():
        if loaded[key].shape != here[key].shape:
            told.append(f"{name}.{key}: loaded {tuple(loaded[key].shape)}, here {tuple(here[key].shape)}")
    return ", ".join(told)


def _keys(name: str, group: Group) -> str:
    return ", ".join(f"{name}.{key}" for key in group)


def some(names: Sequence[Any], most: int = 6) -> str:
    shown = ", ".join(map(str, names[:most])) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
