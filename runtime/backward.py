"""The drop-in door with ``precondition="backward"``: ``.grad`` arrives preconditioned, factors refresh afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .carriers import Carriers, before_backward
from .ranks import Ranks, Replicas
from .state import FactorState


class BackwardPreconditioner:
    """Factors that the backward graphs read, refreshed from the last step's statistics when the next step begins.

    A step begins with the first forward or backward that finds ``.grad`` None. New factors are new tensors: a backward
    whose forward has run already keeps those that it has saved.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Any,
        refresh_every: int,
        build_refresh: Callable[..., Callable],
        job: Callable[..., Any],
        ranks: Ranks | None = None,
        check_replicas_every: int = 0,
    ) -> None:
        self.rule, self.refresh_every = rule, refresh_every
        self.mkor = FactorState(model, refresh_every, self.flush)
        self.carriers, self.ranks = Carriers(), ranks
        self._replicas = Replicas(ranks, self.mkor, check_replicas_every, self.mkor.tensors)
        self._build_refresh, self._job = build_refresh, job
        self._sites: dict[int, tuple[nn.Parameter, Any]] = {}
        self._programs: dict[tuple, Callable[..., list[Tensor]]] = {}

    def inputs(self, param: nn.Parameter, layout: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What the graph is passed for one site: its carrier, then its state in order."""
        self._sites[id(param)] = (param, layout)
        state = self.mkor.create(param, layout.fresh_state_with_scale(self.rule, dtype))
        return [self.carriers.of(param, shape, dtype), *state.values()]

    def watch_backward(self, outputs: Any, params: Sequence[nn.Parameter]) -> None:
        before_backward(outputs, lambda: self.begin(params))

    def begin(self, params: Sequence[nn.Parameter]) -> None:
        """If a new step begins, refresh from what the last one has left."""
        if any(p.grad is None and self.carriers.gradient(p) is not None for p in params):
            self.flush()

    def flush(self) -> None:
        """Refresh every site whose statistics wait; on several ranks every site, since another rank may have seen it."""
        pending = [site for site in self._sites.values() if self.carriers.gradient(site[0]) is not None]
        if not pending:
            return
        if self.ranks is not None:
            pending = list(self._sites.values())
        self._replicas.check()
        refresh = self.mkor.step % self.refresh_every == 0
        jobs = [self._job(self.mkor.name(param), layout, refresh) for param, layout in pending]
        states = [self.mkor.of(param) for param, _ in pending]
        carriers = [self.carriers.total(param) for param, _ in pending]
        tensors = [self.mkor.step_tensor(pending[0][0].device)]
        for carrier, state in zip(carriers, states):
            tensors += [carrier, *state.values()]
        key = (tuple(jobs), tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        if key not in self._programs:
            self._programs[key] = self._build_refresh(jobs, carriers, states, tensors[0])
        with torch.no_grad(), torch._C._DisableAutocast():
            new = iter(self._programs[key](*tensors))
        for (param, _), state in zip(pending, states):
            for name in state:
                state[name] = next(new)
            self.carriers.clear(param)
        self.mkor.advance()
