"""A compiled model whose optimizers' steps are followed: what both modes of the drop-in door share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .carriers import Carriers, Watch
from .draws import Draws
from .factors import FactorState
from .given import Given
from .ranks import Ranks, Replicas
from .silence import Seen, Silence, warn_of_fresh_factors
from .speeds import Speeds
from .steps import Step, follow
from .windows import Windows

Program = Callable[[Given], list[Tensor]]


@dataclass(frozen=True)
class Maker:
    """What the runtime is handed, which knows neither rules nor graphs.

    ``build(kind, jobs, given)`` makes a program: ``"update"`` gives directions, ``"apply"`` takes the steps that are their
    own directions, ``"refresh"`` gives new state. ``job(name, layout, refresh, places, base, owner)`` describes a
    weight to it;
    ``merge(layout, other, bias)`` joins what two graphs say of one. ``derive(step, recipe, state, taken)`` makes state of
    state, every ``derive_every(recipe)`` steps, and ``moving(recipe)`` names what changes otherwise; ``numbers(step,
    device)`` are those of the rules. ``left_alone(name)``: whether the user wants a parameter to be left alone.
    ``part(bias, weight)`` declines a bias that is stepped apart.
    ``stepped(optimizer)`` takes note of whose step has come. With ``speeds`` ranks share what is derived. ``owners(weights,
    known)`` are the ranks that keep the factors of weights, by name; None: every rank keeps all.
    """

    build: Callable[[str, Sequence[Any], Given], Program]
    job: Callable[..., Any]
    merge: Callable[[Any, Any, bool], Any]
    derive: Callable[..., dict[str, Tensor]]
    derive_every: Callable[[Any], int | None]
    moving: Callable[[Any], Collection[str]]
    numbers: Callable[[int, torch.device], Tensor | None]
    left_alone: Callable[[str], bool]
    part: Callable[[str, str], None]
    stepped: Callable[[Optimizer], None]
    speeds: Speeds | None = None
    owners: Callable[..., dict[str, int | None]] | None = None


class Followed:
    """Acts at the steps of every optimizer that holds parameters of a model, as long as it lives."""

    def __init__(
        self, mkor: FactorState, refresh_every: int, maker: Maker, ranks: Ranks | None, replicas: Replicas
    ) -> None:
        self.mkor, self.refresh_every, self.maker, self.ranks = mkor, refresh_every, maker, ranks
        self.carriers, self.draws, self.seen = Carriers(), Draws(), Seen()
        self._replicas, self._silence = replicas, Silence()
        self._refreshes = Windows(mkor)
        self._programs: dict[tuple, Program] = {}
        self._met = False
        #: whether the forwards of this step ran without the rule, which a Hybrid has left
        self.leaves = False
        follow(self)

    # ---- the forward's side -------------------------------------------------------------------------------------------

    def register(self, param: nn.Parameter, layout: Any, bias: nn.Parameter | None, frozen: frozenset[int]) -> bool:
        """Take note of what a graph says of a parameter: a site (``layout``) with its bias, or declined (None), while the
        parameters ``frozen``, by identity, were not trained. Returns whether it sees it as the graphs before."""
        return True

    def forget_plan(self) -> None:
        """The model has changed: graphs will say anew what its parameters are."""
        raise NotImplementedError

    def inputs(self, param: nn.Parameter, recipe: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What a graph is passed for one site: its carrier, then what it reads of its state, in order."""
        raise NotImplementedError

    def prepare(self, params: Sequence[nn.Parameter]) -> None:
        """A forward over ``params`` begins."""

    def begin(self, params: Sequence[nn.Parameter]) -> None:
        """A backward over ``params`` begins."""
        raise NotImplementedError

    def watch(
        self, outputs: Any, params: Sequence[nn.Parameter], writes: Sequence[tuple[nn.Parameter, int]] = ()
    ) -> None:
        """Follow the backward of the compiled function that has made ``outputs`` from ``params``. It ``writes`` into those
        slots of theirs."""

        def begin() -> None:
            self.seen.backward = self.seen.inside = True
            self.begin(params)
            for param, slot in writes:
                self.carriers.write(param, slot)

        def end() -> None:
            self.seen.inside = False
            self.carriers.mark(params)

        Watch(begin, end).on(outputs)

    # ---- the optimizer's side -----------------------------------------------------------------------------------------

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has parameters of this model."""
        return any(self.mkor.known(p) is not None for group in optimizer.param_groups for p in group["params"])

    def meet(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step parameters of this model: say once if it has done so before, and the rule has
        not."""
        if not self._met:
            self._met = True
            held = [p for group in optimizer.param_groups for p in group["params"] if self.mkor.known(p) is not None]
            states = [optimizer.state[p] for p in held if p in optimizer.state]
            warn_of_fresh_factors(self.mkor, states, type(optimizer).__name__)

    def act(self, step: Step, others: list[Followed]) -> None:
        """See to the parameters of a step that are this model's and nobody's yet."""
        raise NotImplementedError

    def has_statistics(self, name: str, param: nn.Parameter) -> bool | None:
        """Whether a weight's gradient has come with statistics; None where it needs none."""
        raise NotImplementedError

    def has_shown(self, param: nn.Parameter) -> bool:
        """Whether some graph has used a parameter."""
        raise NotImplementedError

    def layout_of(self, param: nn.Parameter) -> Any:
        """What the statistics of a weight are statistics of; None where they are not to be shared."""
        return None

    def look(self, step: Step, called: list[Followed]) -> None:
        """Say which parameters came to a step without statistics; the next one begins. Those that another handle of the
        model was ``called`` for are that one's to speak of."""
        others = [] if self.seen.called else [other for other in called if other is not self]
        self._silence.break_for(self._suspects(step, others), lambda: self.seen)
        inside = self.seen.inside
        self.seen = Seen(inside=inside, backward=inside)

    def _suspects(self, step: Step, others: list[Followed]) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Names of parameters without statistics, and whether a graph has shown them."""
        for param in step.parameters():
            name = self.mkor.known(param)
            if name is None or self.maker.left_alone(name) or any(other.mkor.known(param) for other in others):
                continue
            if self.has_statistics(name, param) is False:
                yield name, param, self.has_shown(param)

    def check_slots(self, sites: Iterable[tuple[nn.Parameter, Any]], others: Sequence[Followed] = ()) -> None:
        """Before statistics of these parameters, by their layouts, are used: what was gathered is in slots of its own.

        Raises:
            ValueError: two micro-batches were written into one.
        """
        for param, layout in sites:
            added = (self, *(other for other in others if other.layout_of(param) == layout))
            written = sum((one.carriers.written(param) for one in added), Counter[int]())
            if max(written.values(), default=0) > 1:
                error = layout.shared_slot(self.mkor.name(param), written.total())
                if self.ranks is not None:
                    self.ranks.failed(error)
                raise error

    def program(self, kind: str, jobs: Sequence[Any], given: Given) -> Program:
        """The program for ``jobs`` over tensors like those ``given``."""
        key = (kind, tuple(jobs), given.like())
        if key not in self._programs:
            self._programs[key] = self.maker.build(kind, jobs, given)
        return self._programs[key]
