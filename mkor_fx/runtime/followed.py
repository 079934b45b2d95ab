"""A compiled model whose optimizers' steps are followed: what both modes of the drop-in door share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .carriers import Carriers, Watch
from .factors import FactorState
from .given import Given
from .ranks import Ranks, Replicas
from .silence import Seen, Silence
from .steps import Step, follow

Program = Callable[[Given], list[Tensor]]


@dataclass(frozen=True)
class Maker:
    """What the runtime is handed, which knows neither rules nor graphs.

    ``build(kind, jobs, given)`` makes a program: ``"update"`` gives directions, ``"apply"`` takes the steps that are their
    own directions, ``"refresh"`` gives new state. ``job(name, layout, refresh, places)`` describes a weight to it, ``merge``
    joins what two graphs say of one. ``derive(step, name, layout, state)`` makes state of state, ``numbers(step, device)``
    are those of the rules. ``left_alone(name)``: whether the user wants a parameter to be left alone.
    """

    build: Callable[[str, Sequence[Any], Given], Program]
    job: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    derive: Callable[..., dict[str, Tensor]]
    numbers: Callable[[int, torch.device], Tensor | None]
    left_alone: Callable[[str], bool]


class Followed:
    """Acts at the steps of every optimizer that holds parameters of a model, as long as it lives."""

    def __init__(
        self, mkor: FactorState, refresh_every: int, maker: Maker, ranks: Ranks | None, replicas: Replicas
    ) -> None:
        self.mkor, self.refresh_every, self.maker, self.ranks = mkor, refresh_every, maker, ranks
        self.carriers, self.seen = Carriers(), Seen()
        self._replicas, self._silence = replicas, Silence()
        self._programs: dict[tuple, Program] = {}
        follow(self)

    # ---- the forward's side -------------------------------------------------------------------------------------------

    def register(self, param: nn.Parameter, layout: Any, bias: nn.Parameter | None) -> bool:
        """Take note of what a graph says of a parameter: a site (``layout``) with its bias, or declined (None). Returns
        whether it sees it as the graphs before."""
        return True

    def forget_plan(self) -> None:
        """The model has changed: graphs will say anew what its parameters are."""
        raise NotImplementedError

    def inputs(self, param: nn.Parameter, recipe: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What a graph is passed for one site: its carrier, then what it reads of its state, in order."""
        raise NotImplementedError

    def prepare(self, params: Sequence[nn.Parameter]) -> None:
        """A forward over ``params`` begins."""

    def before_save(self) -> None:
        """State is about to be looked at."""

    def begin(self, params: Sequence[nn.Parameter]) -> None:
        """A backward over ``params`` begins."""
        raise NotImplementedError

    def watch(self, outputs: Any, params: Sequence[nn.Parameter]) -> None:
        """Follow the backward of the compiled function that has made ``outputs`` from ``params``."""

        def begin() -> None:
            self.seen.backward = self.seen.inside = True
            self.begin(params)

        def end() -> None:
            self.seen.inside = False
            self.carriers.mark(params)

        Watch(begin, end).on(outputs)

    # ---- the optimizer's side -----------------------------------------------------------------------------------------

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has parameters of this model."""
        return any(self.mkor.known(p) is not None for group in optimizer.param_groups for p in group["params"])

    def act(self, step: Step, others: list[Followed]) -> None:
        """See to the parameters of a step that are this model's and nobody's yet."""
        raise NotImplementedError

    def has_statistics(self, name: str, param: nn.Parameter) -> bool | None:
        """Whether a weight's gradient has come with statistics; None where it needs none."""
        raise NotImplementedError

    def layout_of(self, param: nn.Parameter) -> Any:
        """What the statistics of a weight are statistics of; None where they are not to be shared."""
        return None

    def look(self, step: Step) -> None:
        """Say which parameters came to a step without statistics; the next one begins."""
        self._silence.break_for(self._suspects(step), lambda: self.seen)
        inside = self.seen.inside
        self.seen = Seen(inside=inside, backward=inside)

    def _suspects(self, step: Step) -> Iterator[tuple[str, nn.Parameter]]:
        for param in step.parameters():
            name = self.mkor.known(param)
            if name is None or self.maker.left_alone(name):
                continue
            if self.has_statistics(name, param) is False:
                yield name, param

    def program(self, kind: str, jobs: Sequence[Any], given: Given) -> Program:
        """The program for ``jobs`` over tensors like those ``given``."""
        key = (kind, tuple(jobs), given.like())
        if key not in self._programs:
            self._programs[key] = self.maker.build(kind, jobs, given)
        return self._programs[key]
