"""The drop-in door with ``precondition="backward"``: ``.grad`` arrives preconditioned, state refreshes afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import flat
from .factors import FactorState
from .followed import Followed, Maker
from .given import Given, WeightTensors
from .ranks import Ranks, Replicas
from .steps import Step
from .windows import Windows


class InBackward(Followed):
    """State that the backward graphs read, refreshed from the last step's statistics when the next step begins.

    A step begins with the first forward or backward that finds gradients cleared: None, or changed in place since the last
    backward. New state is new tensors: a backward whose forward has run already keeps those that it has saved.
    """

    def __init__(
        self,
        model: nn.Module,
        mkor: FactorState,
        refresh_every: int,
        maker: Maker,
        ranks: Ranks | None = None,
        check_replicas_every: int = 0,
    ) -> None:
        super().__init__(mkor, refresh_every, maker, ranks, Replicas(ranks, mkor, check_replicas_every, mkor.tensors))
        self._sites: dict[int, tuple[weakref.ref[nn.Parameter], Any]] = {}
        self._derives = Windows(mkor)
        self._generation = mkor.generation
        mkor.newer, mkor.waits = self._newer, lambda: bool(self._pending())

    def prepare(self, params: Sequence[nn.Parameter]) -> None:
        self.begin(params)

    def forget_plan(self) -> None:
        """The model has changed: graphs will say anew what its parameters are."""
        self.flush()
        self._sites.clear()

    def inputs(self, param: nn.Parameter, recipe: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What the graph is passed for one site: its carrier, then its state in order."""
        self._sites[id(param)] = (weakref.ref(param), recipe)
        state = self.mkor.create(param, recipe)
        return [self.carriers.of(param, shape, dtype), *state.values()]

    def begin(self, params: Sequence[nn.Parameter]) -> None:
        """If a new step begins, refresh from what the last one has left."""
        self._drop_outdated()
        if any(self.carriers.gradient(p) is not None and self.carriers.begins(p) for p in params):
            self.flush()

    def flush(self) -> None:
        """Take over what the statistics that wait make of the state."""
        pending = self._pending()
        if not pending:
            return
        due = self._refreshes.due((self.mkor.name(param) for param, _ in pending), self.mkor.clock, self.refresh_every)
        self.check_slots((param, recipe.layout) for param, recipe in pending if self.mkor.name(param) in due)
        self._replicas.check()
        step, refreshed, states, derived = self._refreshed(pending)
        for name, state in {**states, **derived}.items():
            held = self.mkor.state(name)
            held.update({key: _laid_out_as(held[key], tensor) for key, tensor in state.items()})
        for param, _ in pending:
            self.carriers.clear(param)
        self._refreshes.done(refreshed, step, self.refresh_every)
        self._have_derived(derived, step)
        self.mkor.advance()

    def _newer(self) -> dict[str, Tensor]:
        """State as it will be when the next step begins, by key; nothing is changed, since this step may go on."""
        pending = self._pending()
        if not pending:
            return {}
        _, _, states, derived = self._refreshed(pending)
        return flat({**states, **derived})

    def _pending(self) -> list[tuple[nn.Parameter, Any]]:
        """The sites whose statistics wait; on several ranks every site, since another rank may have seen it."""
        alive = {key: (param, recipe) for key, (ref, recipe) in self._sites.items() if (param := ref()) is not None}
        self._sites = {key: self._sites[key] for key in alive}
        self._drop_outdated()
        pending = [site for site in alive.values() if self.carriers.gradient(site[0]) is not None]
        return list(alive.values()) if pending and self.ranks is not None else pending

    def _drop_outdated(self) -> None:
        """State that was replaced from outside is of another time than the statistics that wait."""
        if self._generation != self.mkor.generation:
            self._generation = self.mkor.generation
            for ref, _ in self._sites.values():
                if (param := ref()) is not None:
                    self.carriers.clear(param)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _refreshed(self, pending: list[tuple[nn.Parameter, Any]]) -> tuple[int, set[str], dict[str, Any], dict[str, Any]]:
        """The step, the weights that refresh in it, and new state of all that are ``pending``; and what is derived of it."""
        step, device = self.mkor.clock, pending[0][0].device
        names = [self.mkor.name(param) for param, _ in pending]
        refreshed = self._refreshes.due(names, step, self.refresh_every)
        jobs = [self.maker.job(name, recipe.layout, name in refreshed) for name, (_, recipe) in zip(names, pending)]
        held = [self.mkor.of(param) for param, _ in pending]
        weights = []
        for (param, _), state in zip(pending, held):
            own = {key: tensor for key, tensor in state.items() if key != "scale"}
            weights.append(WeightTensors(own, carrier=self.carriers.total(param), scale=state["scale"]))
        given = Given(self.mkor.step_tensor(device), weights, numbers=self.maker.numbers(step, device))
        new = iter(self.program("refresh", jobs, given)(given))
        states = {name: {key: next(new) for key in state} for name, state in zip(names, held)}
        return step, refreshed, states, self._derived(names, step, states)

    def _derived(self, names: Iterable[str], step: int, states: Mapping[str, Any]) -> dict:
        """What the rules derive behind a step from the ``states`` of those weights for which that is due, by name."""
        found = {}
        for name in names:
            every = self.maker.derive_every(self.mkor.recipe(name))
            if every is not None and self._derives.due([name], step, every):
                derive = lambda recipe, state: self.maker.derive(step, recipe, state)
                found[name] = self.mkor.derived(name, derive, states[name])
        return found

    def _have_derived(self, names: Iterable[str], step: int) -> None:
        """Take note that ``_derived`` has become the state of weights."""
        for name in names:
            every = self.maker.derive_every(self.mkor.recipe(name))
            assert every is not None
            self._derives.done([name], step, every)

    # ---- the optimizer's side -----------------------------------------------------------------------------------------

    def act(self, step: Step, others: list[Any]) -> None:
        """Nothing: gradients have come as directions."""

    def has_statistics(self, name: str, param: nn.Parameter) -> bool | None:
        """By name, since sharding wrappers step other tensors than graphs have seen."""
        seen = {self.mkor.name(site): site for ref, _ in self._sites.values() if (site := ref()) is not None}
        if name in seen:
            return self.carriers.gradient(seen[name]) is not None
        return None if seen or param.dim() < 2 else False

    def has_shown(self, param: nn.Parameter) -> bool:
        sites = (ref() for ref, _ in self._sites.values())
        return self.mkor.name(param) in {self.mkor.name(site) for site in sites if site is not None}


def _laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """``new`` in the memory order that compiled graphs expect."""
    return new if new.stride() == old.stride() else torch.empty_like(old).copy_(new)
