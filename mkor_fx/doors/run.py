"""One variant of a compiled step: as it is written, and as Dynamo calls it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..passes.match.layout import Layout
from ..passes.pipeline import Variant
from ..passes.torch_api.backend import plain_tracing
from ..passes.torch_api.capture import WholeStep
from ..passes.write.late_statistics import nothing, refresh_now
from ..passes.write.step_draft import StepDraft
from ..runtime.compiled_step import CompiledStep
from ..runtime.inputs import Call
from ..runtime.silence import warn_of_fresh_factors
from ..show.coverage import Coverage
from ..show.graphs import Graphs
from .agreement import present_numbers
from .checks import check_gradient_hooks, check_memory
from .optimizer_checks import check_step_hooks
from .rule_clock import RuleClock


@dataclass(frozen=True)
class Written:
    """One variant of the whole step as a lowered graph, not yet compiled. ``params``: by input position; ``layouts`` of the
    sites, ``here`` those whose factors are on this rank, which is at ``place`` in its row."""

    draft: StepDraft
    variant: Variant
    graphs: Graphs
    coverage: Coverage
    params: dict[int, nn.Parameter]
    layouts: dict[int, Layout]
    here: list[int]
    place: int

    @property
    def whole(self) -> WholeStep:
        return self.draft.step

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that the base optimizer steps."""
        return [self.params[i] for i in self.draft.plan.trained if i not in self.draft.final]


class Run:
    """What Dynamo calls in the place of its graph: a program, and what it is passed behind Dynamo's inputs."""

    def __init__(
        self, step: CompiledStep, clock: RuleClock, written: Written, compiled: Callable[..., Any], plan: str
    ) -> None:
        draft = written.draft
        self._step, self._clock, self._compiled, self._plan = weakref.ref(step), clock, compiled, plan
        self._variant, self._inputs, self._results = written.variant, list(draft.inputs), draft.results
        self._device, self._late, self._owners = draft.device, draft.plan.late, dict(draft.plan.owners)
        self._layouts, self._here, self._place = written.layouts, written.here, written.place
        self._coverage = written.coverage
        self._keeps = written.variant.has("precondition") or bool(draft.plan.states)
        self._trained = [i for i in draft.plan.trained if i not in draft.final]
        self._names = {index: written.whole.parameters[index].name for index in draft.plan.trained}
        self._trains = frozenset(self._names.values())
        self._memory: list[int] = []
        self._ready = False

    def __call__(self, *args: Any) -> list[Any]:
        step = self._step()
        assert step is not None
        self._check_anew(step, args)
        names = {step.mkor.name(args[index]): index in self._here for index in self._layouts}
        step.uses(self._variant, names)
        step.begin(self._variant.name, self._plan, present_numbers)
        if not self._ready:
            self._commit(step, args)
        step.coverage = self._coverage
        if step.ema is not None and self._variant.has("average_weights"):
            step.ema.trains(self._trains)
        receives, sends = self._variant.has("arrive"), self._variant.has("send")
        with plain_tracing():
            waiting = step.late.take(self._late, lambda: nothing(self._late, self._device)) if receives else []
            call = Call(step, args, self._device, waiting)
            outputs = self._compiled(*args, *(source.fetch(call) for source in self._inputs))
        if self._late:
            step.late.clear()
        if sends:
            outputs, sent = outputs[: self._results], list(outputs[self._results :])
            layouts = {step.mkor.name(args[index]): self._layouts[index] for index in self._here}
            step.late.put(sent, self._late, lambda tensors: self._settle(step, layouts, tensors))
        return outputs

    def _check_anew(self, step: CompiledStep, args: Sequence[Any]) -> None:
        """What can have happened since the last step without a parameter's being replaced."""
        check_step_hooks(step.optimizers)
        check_gradient_hooks((name, args[index]) for index, name in self._names.items())
        memory = [args[index].data_ptr() for index in self._names]
        if memory != self._memory:
            check_memory((name, args[index]) for index, name in self._names.items())
            self._memory = memory

    def _commit(self, step: CompiledStep, args: Sequence[Any]) -> None:
        """Make what the program changes: factors, and the optimizer's state. Nothing was, before all that can fail."""
        if self._keeps:
            states = [step.optimizers.state_of(args[index]) for index in self._names]
            warn_of_fresh_factors(step.mkor, states, step.optimizers.names)
            step.mkor.place(self._owners, {args[index]: layout for index, layout in self._layouts.items()}, self._place)
        if self._variant.has("optimize"):
            step.prepare_optimizer([args[index] for index in self._trained])
        self._ready = True

    def _settle(self, step: CompiledStep, layouts: dict[str, Layout], tensors: list[Tensor]) -> dict[str, Tensor]:
        """The factors as the next refresh will make them of what is on its way."""
        taken, *buffers = tensors
        if not taken:
            return {}
        count = step.mkor.step - 1
        numbers = {name: self._clock.of(layout.rule, count) for name, layout in layouts.items()}
        states = {name: step.mkor.state(name) for name in layouts}
        new = refresh_now(layouts, numbers, self._late, buffers, states, count)
        return {f"{name}.{key}": t for name, state in new.items() for key, t in state.items()}
