"""The drop-in door with ``precondition="backward"``: ``.grad`` arrives preconditioned, state refreshes afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .factors import FactorState
from .followed import Followed, Maker
from .given import Given, WeightTensors
from .ranks import Ranks, Replicas
from .steps import Step


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

    def before_save(self) -> None:
        """Nothing waits outside of what is saved."""
        self.flush()

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
        if any(self.carriers.gradient(p) is not None and self.carriers.begins(p) for p in params):
            self.flush()

    def flush(self) -> None:
        """Refresh every site whose statistics wait; on several ranks every site, since another rank may have seen it."""
        alive = {key: (param, recipe) for key, (ref, recipe) in self._sites.items() if (param := ref()) is not None}
        self._sites = {key: self._sites[key] for key in alive}
        pending = [site for site in alive.values() if self.carriers.gradient(site[0]) is not None]
        if not pending:
            return
        if self.ranks is not None:
            pending = list(alive.values())
        self._replicas.check()
        step, device = self.mkor.step, pending[0][0].device
        refresh = step % self.refresh_every == 0
        jobs = [self.maker.job(self.mkor.name(param), recipe.layout, refresh) for param, recipe in pending]
        states = [self.mkor.of(param) for param, _ in pending]
        given = Given(
            self.mkor.step_tensor(device),
            [WeightTensors(state, carrier=self.carriers.total(param)) for (param, _), state in zip(pending, states)],
            numbers=self.maker.numbers(step, device),
        )
        new = iter(self.program("refresh", jobs, given)(given))
        for (param, _), state in zip(pending, states):
            for name in state:
                state[name] = next(new)
            self.carriers.clear(param)
        self.mkor.derive([job.name for job in jobs], lambda *weight: self.maker.derive(step, *weight), in_place=False)
        self.mkor.advance()

    # ---- the optimizer's side -----------------------------------------------------------------------------------------

    def act(self, step: Step, others: list[Any]) -> None:
        """Nothing: gradients have come as directions."""

    def has_statistics(self, name: str, param: nn.Parameter) -> bool | None:
        """By name, since sharding wrappers step other tensors than graphs have seen."""
        seen = {self.mkor.name(site): site for ref, _ in self._sites.values() if (site := ref()) is not None}
        if name in seen:
            return self.carriers.gradient(seen[name]) is not None
        return None if seen or param.dim() < 2 else False
