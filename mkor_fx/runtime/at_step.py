"""The drop-in door at run time: statistics from the backward, and the update at the optimizer's step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .base_step import base_step_of
from .derivations import Derivations
from .factors import FactorState
from .followed import Followed, Maker
from .given import Given, WeightTensors
from .known import Known
from .loss_scale import loss_scales
from .optimizer_state import OptimizerNumbers, groups_of, place_of_rate
from .ranks import Ranks, Replicas, state_of
from .steps import Step
from .switch import part_of_the_way


class AtStep(Followed):
    """Statistics and updates of one compiled model, resolved from the parameters of each call."""

    def __init__(
        self,
        model: nn.Module,
        mkor: FactorState,
        refresh_every: int,
        maker: Maker,
        ranks: Ranks | None = None,
        check_replicas_every: int = 0,
    ) -> None:
        replicas = Replicas(ranks, mkor, check_replicas_every, lambda: state_of(model, mkor))
        super().__init__(mkor, refresh_every, maker, ranks, replicas)
        shares = 0 if ranks is None or maker.speeds is None else ranks.size
        self._derivations = Derivations(mkor, maker.derive, maker.derive_every, maker.moving, shares, maker.speeds)
        self.known: dict[int, Known] = {}
        self._placed: dict[str, Any] = {}
        self._rates: weakref.WeakKeyDictionary[Optimizer, OptimizerNumbers] = weakref.WeakKeyDictionary()
        self._iteration = 0
        self._stepped: set[str] = set()
        self._generation = 0
        self._asked = False

    # ---- the forward's side -------------------------------------------------------------------------------------------

    def register(self, param: nn.Parameter, layout: Any, bias: nn.Parameter | None, frozen: frozenset[int]) -> bool:
        """Declined in one graph is declined, and so is what two graphs do not agree on."""
        known = self._known(param)
        if known is None:
            self.known = {key: other for key, other in self.known.items() if other.ref() is not None}
            known = self.known[id(param)] = Known(param)
            if layout is not None:
                known.layout, known.bias = layout, None if bias is None else weakref.ref(bias)
                known.frozen = frozen if bias is None else frozenset()
        elif layout is not None and known.layout is not None:
            known.join(layout, bias, frozen, self.maker.merge)
        agrees = layout is None or known.layout is not None
        known.declined |= layout is None or not agrees
        return agrees

    def _known(self, param: nn.Parameter) -> Known | None:
        known = self.known.get(id(param))
        return known if known is not None and known.ref() is param else None

    def forget_plan(self) -> None:
        """The model has changed: graphs will say anew what its parameters are."""
        self.known.clear()
        self._placed.clear()

    def inputs(self, param: nn.Parameter, recipe: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What a graph is passed for one site: its carrier, and its state if its statistics depend on it."""
        carrier = self.carriers.of(param, shape, dtype)
        return [carrier, *(self.mkor.create(param, recipe).values() if recipe.reads_state else ())]

    def begin(self, params: Sequence[nn.Parameter]) -> None:
        """Start the statistics afresh where what was accumulated before is gone."""
        for param in params:
            self.carriers.restart(param)

    # ---- the optimizer's side -----------------------------------------------------------------------------------------

    def has_statistics(self, name: str, param: nn.Parameter) -> bool | None:
        known = self._known(param)
        if self.leaves:
            return None
        if known is None:  # no graph has shown it: a matrix would have been looked at
            return False if param.dim() > 1 else None
        return None if known.declined or known.layout is None else self.carriers.gradient(param) is not None

    def has_shown(self, param: nn.Parameter) -> bool:
        return self._known(param) is not None

    def act(self, step: Step, others: list[Any]) -> None:
        """Let the optimizer see directions in place of gradients, until its step ends.

        Only sites with fresh statistics: a gradient that did not come out of the compiled backward stays raw. On several
        ranks every site with a gradient takes part once one has fresh statistics: another rank may have seen it.
        """
        held = {
            self.mkor.name(param): known
            for param in step.parameters()
            if (known := self._known(param)) is not None and known.layout is not None and not known.declined
        }
        if self.leaves:
            return self._leave_to_the_optimizer(step, held)
        fresh = {name: known for name, known in held.items() if self.carriers.gradient(known.param) is not None}
        if not fresh:
            return
        self.maker.stepped(step.optimizer)
        sites = fresh if self.ranks is None else held
        begins = self._begins(sites)
        if begins:
            self._replicas.check()
        self._place(sites)
        iteration = self.mkor.step if begins else self._iteration
        refreshed = self._refreshes.due(sites, iteration, self.refresh_every)
        others = [other for other in others if other is not self]
        used = filter(self._is_here, refreshed)
        self.check_slots(((sites[name].param, sites[name].layout) for name in used), others)
        taken = self._run(step, iteration, sites, refreshed, others)
        self._take_note(sites, begins)
        self._refreshes.done(refreshed, iteration, self.refresh_every)
        self._derivations.run([*filter(self._is_here, sites)], iteration, taken)

    def _place(self, sites: dict[str, Known]) -> None:
        """Where weights have owners: find one for each, and make the factors that are this rank's."""
        if self.maker.owners is None or self.ranks is None:
            return
        shown = {name: known.layout for name, known in sites.items()}
        if shown.items() <= self._placed.items():
            return
        about = {name: (known.layout, known.param, known.bias and known.bias()) for name, known in sites.items()}
        owners = self.maker.owners(about, self.mkor.owners)
        self.mkor.place(owners, {known.param: known.layout for known in sites.values()}, self.ranks.rank)
        self._placed |= shown

    def _is_here(self, name: str) -> bool:
        """Whether this rank keeps the factors of a weight."""
        owner = self.mkor.owners.get(name)
        return owner is None or self.ranks is None or owner == self.ranks.rank

    def _begins(self, sites: dict[str, Known]) -> bool:
        """Whether this is another iteration, and not a further optimizer's part of the one before."""
        if self._generation != self.mkor.generation:
            self._generation, self._stepped = self.mkor.generation, set()
        return not self._stepped or bool(sites.keys() & self._stepped)

    def _take_note(self, sites: dict[str, Known], begins: bool) -> None:
        """These have been stepped. One step for all optimizers of an iteration: it ends when a site that it has used
        comes again."""
        if begins:
            self._iteration, self._stepped = self.mkor.step, set()
            self.mkor.advance()
        self._stepped |= sites.keys()

    def look(self, step: Step, called: list[Any]) -> None:
        """Also that a ``Hybrid`` has to be told of losses, once."""
        super().look(step, called)
        switch = self.mkor.switch
        if switch is not None and not switch.told and not self._asked and self.mkor.step - self.mkor.loaded_step > 1:
            self._asked = True
            warnings.warn(
                "mkor_fx: Hybrid decides by the loss, and has been told of none in two steps: call "
                "model.mkor.observe(loss) behind "
                "each optimizer.step(), else its rule is never left",
                stacklevel=2,
            )

    def _leave_to_the_optimizer(self, step: Step, held: dict[str, Known]) -> None:
        """A ``Hybrid`` has left its rule: the optimizer steps on raw gradients, at its share of the rate."""
        if not held:
            return
        assert self.mkor.switch is not None
        groups, before, rate = groups_of(step.optimizer), [], self.mkor.switch.settings.rate
        warmth = self.mkor.switch.warmth
        for name, known in held.items():
            base = base_step_of(step.optimizer, groups[id(known.param)])
            share = self.maker.job(name, known.layout, False, base=base).sizing.share_of_rate(rate)
            bias = self._bias_to_take(name, known, step)
            for param in () if share == 1.0 else (known.param, *(() if bias is None else (bias,))):
                before.append((param.detach(), param.detach().clone(), share * warmth))
            step.handled |= {id(known.param)} | ({id(bias)} if bias is not None else set())

        def take_the_share() -> None:
            for now, old, share in before:
                now.copy_(part_of_the_way(old, now, share))

        step.at_the_end(take_the_share)
        self._take_note(held, self._begins(held))

    def _run(
        self, step: Step, iteration: int, sites: dict[str, Known], refreshed: set[str], others: list[Any]
    ) -> Tensor | None:
        """Directions in place of gradients. Whether the step counts, 0-dim; None: it does."""
        device = next(iter(sites.values())).param.device
        scales = loss_scales(step.optimizer, device) or None
        jobs, weights, biases = [], [], []
        groups = groups_of(step.optimizer)
        for name, known in sites.items():
            group = groups[id(known.param)]
            base = base_step_of(step.optimizer, group)
            biases.append(bias := self._bias_to_take(name, known, step))
            owner, here = self.mkor.owners.get(name), self._is_here(name)
            job = self.maker.job(name, known.layout, name in refreshed, base=base, owner=owner)
            if job.needs_rates:
                held = (group, None if bias is None else groups[id(bias)])
                places = tuple(None if at is None else place_of_rate(step.optimizer, at) for at in held)
                job = self.maker.job(name, known.layout, name in refreshed, places, base, owner)
            jobs.append(job)
            carrier = self._statistics(known, others) if here and name in refreshed else None
            state = self.mkor.create(known.param, known.layout) if here else {}
            grad = None if biases[-1] is None else biases[-1].grad
            weight = known.param.detach() if job.bounded else None
            weights.append(WeightTensors(state, known.param.grad, grad, carrier, weight=weight))
        clock = torch.full((), iteration, dtype=torch.int64, device=device)
        borrows = any(job.needs_rates or job.sizing.momentum_at is not None for job in jobs)
        rates = self._numbers_of(step.optimizer, device) if borrows else None
        given = Given(clock, weights, scales, self.maker.numbers(iteration, device), rates)
        directions = iter(self.program("update", jobs, given)(given))
        own: list[tuple[Any, Known, nn.Parameter | None, Tensor, Tensor | None]] = []
        for job, known, bias in zip(jobs, sites.values(), biases):
            direction, of_bias = next(directions), None if bias is None else next(directions)
            step.replace(known.param, None if job.final else direction)
            if bias is not None:
                step.replace(bias, None if job.final else of_bias)
            if job.final:
                own.append((job, known, bias, direction, of_bias))
            step.handled |= {id(known.param)} | ({id(bias)} if bias is not None else set())
            for one in (self, *others):
                one.carriers.clear(known.param)
        if own:
            step.at_the_end(lambda: self._take_steps(step.optimizer, own, scales))
        return None if scales is None else torch.isfinite(scales[1])

    def _bias_to_take(self, name: str, known: Known, step: Step) -> nn.Parameter | None:
        """The bias that is stepped together with its weight, if there is one."""
        bias = known.bias_with_gradient(step)
        if bias is None or step.holds(bias):
            return bias
        if known.layout.bias:
            self.maker.part(self.mkor.name(bias), name)
        return None

    def _statistics(self, known: Known, others: list[Any]) -> Tensor:
        """Of everything that was accumulated for a weight, by other compiled models that share it as well."""
        total = self.carriers.total(known.param)
        for other in others:
            arrived = other.carriers.gradient(known.param)
            if arrived is not None and arrived.shape == total.shape and other.layout_of(known.param) == known.layout:
                total = total + arrived
        return total

    def layout_of(self, param: nn.Parameter) -> Any:
        known = self._known(param)
        return None if known is None else known.layout

    def _take_steps(self, optimizer: Optimizer, own: list[Any], scales: Any) -> None:
        """``W <- W (1 - lr wd) - lr D`` for the weights whose direction is the step itself."""
        jobs, weights = [], []
        groups = groups_of(optimizer)
        for job, known, bias, direction, of_bias in own:
            stepped = (known.param, bias)
            places = tuple(None if p is None else place_of_rate(optimizer, groups[id(p)]) for p in stepped)
            jobs.append(self.maker.job(job.name, job.layout, False, places, job.base))
            parameters = known.param.detach(), None if bias is None else bias.detach()
            weights.append(WeightTensors({}, direction, of_bias, None, None, *parameters))
        device = weights[0].grad.device
        clock = torch.zeros((), dtype=torch.int64, device=device)
        given = Given(clock, weights, scales, rates=self._numbers_of(optimizer, device))
        self.program("apply", jobs, given)(given)

    def _numbers_of(self, optimizer: Optimizer, device: torch.device) -> Tensor:
        """The present numbers of an optimizer, packed."""
        if optimizer not in self._rates or self._rates[optimizer].stale(optimizer, device):
            self._rates[optimizer] = OptimizerNumbers(optimizer, device)
        return self._rates[optimizer].update()
