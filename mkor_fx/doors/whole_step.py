"""Behind ``compile_step``: the Dynamo backend whose callable is the training step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from .. import reasons
from ..options import Options
from ..passes.match.layout import Layout
from ..passes.naming import Naming
from ..passes.order.collectives import Group, Network
from ..passes.pipeline import REWRITE, VARIANTS, Variant, analyse, choose, closing, part_of, refresh_of, synthesise
from ..passes.torch_api.backend import FakeTensorMode, compile_graph, plain_tracing
from ..passes.torch_api.capture import capture_whole_step, trace_artifact
from ..passes.torch_api.dynamo import dynamo_compile, dynamo_parameters, held_weakly, recurrence
from ..passes.write.late_statistics import buffers_of
from ..passes.write.step_draft import Plan, StepDraft
from ..passes.write.try_optimizers import try_optimizers
from ..runtime.compiled_step import CompiledStep
from ..runtime.factors import FactorState
from ..runtime.optimizers import Optimizers
from ..runtime.ranks import Ranks
from ..runtime.step_maker import StepMaker
from ..runtime.switch import Switch
from ..show.coverage import Coverage
from ..show.graphs import Graphs
from ..show.waiting import shown
from .agreement import apart_of, buffer_names, group_of, keepers_of, owners_of, plan_of
from .checks import check_call, check_gradient_hooks, check_model, check_still_alone
from .loss_function import loss_function
from .optimizer_checks import check_optimizer
from .rule_clock import RuleClock
from .run import Run, Written
from .states import possible_states, rotation_of, slots_of


def new_step(
    model: nn.Module,
    loss_fn: Callable | None,
    optimizer: Optimizer | Sequence[Optimizer],
    options: Options,
    ranks: Ranks | None,
) -> CompiledStep:
    """A compiled step over a model and an optimizer that have been checked."""
    clock, rule = RuleClock(options.rules), bool(options.rules)
    loss_of, every = loss_function(model, loss_fn, options.return_outputs), options.refresh_every if rule else 1

    def pick(step: int, fallback: bool, due: Collection[str] | None = ()) -> Variant:
        if due is None or due:
            return VARIANTS["refresh"] if due is None else refresh_of(due)
        turn = mkor.rotation.turn(step)
        return choose(step, every, rule=rule, fallback=fallback, stale=options.stale, turn=turn)

    def check() -> None:
        check_model(model)
        check_optimizer(model, optimizer, changed=True)
        check_gradient_hooks(model.named_parameters())
        Naming.of(model, options.skip, options.rules)
        mkor.rotation, mkor.slots = rotation_of(model, options), slots_of(model, options)

    def check_arguments(args: tuple, kwargs: dict) -> None:
        check_call(model, loss_fn is not None, args, kwargs)

    def build(step: CompiledStep, variant: Variant) -> Callable[..., Any]:
        try_optimizers(step.optimizers, ahead=1)
        return StepProgram(step, variant, options, clock, loss_of)

    try_optimizers(Optimizers.of(optimizer))
    mkor = FactorState(model, every, expect=possible_states(options.rules))
    mkor.rotation, mkor.slots = rotation_of(model, options), slots_of(model, options)
    if options.hybrid is not None:
        mkor.switch = Switch(options.hybrid)
    keepers = keepers_of(options.placement, 1 if ranks is None else ranks.size)
    maker = StepMaker(
        pick, build, check, check_arguments, clock.derive, clock.derive_every, clock.moving, clock.numbers, keepers, part_of,
        options.accumulate, options.ema, options.communication.speeds,
    )  # fmt: skip
    return CompiledStep(model, optimizer, mkor, maker, ranks, options.communication.check_replicas_every)


def write_whole_step(
    step: CompiledStep, variant: Variant, options: Options, group: Group | None, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Written:
    """capture -> canonicalize -> match -> rewrite -> schedule -> lower, of Dynamo's graph ``gm``. Changes nothing."""
    naming = Naming.of(step.model, options.skip, options.rules)
    held = {id(p) for group in step.optimizers.param_groups for p in group["params"]}
    params = {index: p for index, (_, p) in dynamo_parameters(gm, naming).items()}
    coverage = Coverage(step.model)
    coverage.rotation = step.mkor.rotation
    graphs = Graphs(f"{type(step.model).__name__}: {variant.name} step", coverage, variant.has("refresh"))

    whole = capture_whole_step(gm, inputs, naming)
    for index, parameter in whole.parameters.items():
        if not options.rules:
            parameter.excluded = reasons.NO_RULE
        elif id(params[index]) not in held:
            parameter.excluded = reasons.NOT_HELD
    trained = [i for i, p in whole.parameters.items() if p.grad is not None and id(params[i]) in held]
    if not trained:
        raise ValueError("no parameter that the optimizer holds gets a gradient from this loss")

    with plain_tracing():
        analyse(whole, options.rules, graphs)
        coverage.add(whole)
        coverage.trained_by(step.optimizers, step.model.named_parameters())
        trace_artifact("mkor_fx_coverage", coverage.to_json)
        owners = owners_of(whole, options, group, step.mkor.owners) if options.rules else {}
        coverage.owners = owners
        coverage.local = options.placement == "local" and group is not None and group.row is not None
        layouts = {index: Layout.of(site) for index, site in whole.sites.items()}
        place = 0 if group is None else group.place
        here = [i for i, site in whole.sites.items() if owners.get(site.parameter.name) in (None, place)]
        reads_state = variant.has("statistics") and any(rule.reads_state for rule in options.rules)
        uses_state = variant.has("precondition") or variant.has("refresh") or reads_state
        meta = torch.device("meta")
        plan = Plan(
            step.optimizers,
            list(options.rules),
            params,
            trained,
            states={i: on_device(layouts[i].fresh_state(meta), params[i].device) for i in here} if uses_state else {},
            buffers=buffer_names(gm, step.model),
            owners=owners,
            local=coverage.local,
            apart=apart_of(whole, options, group, owners),
            late=buffers_of(whole) if options.stale and options.rules else (),
            sends=variant.has("send"),
            due=variant.due,
            rows=options.communication.average == "rows",
            clip_norm=options.clip_norm,
            ema=options.ema,
            base_rate=1.0 if options.hybrid is None else options.hybrid.rate,
            parts=options.accumulate > 1,
            skip_nonfinite=options.skip_nonfinite and not variant.has("accumulate"),
            updates=step.updates,
            refreshes=variant.has("refresh"),
        )
        draft = StepDraft(whole, plan, None if group is None else Network(whole.graph, group))
        passes = [p for p in REWRITE if variant.has(p.name)]
        inductor = options.compiler.backend == "inductor"
        synthesise(draft, passes, graphs, inductor=inductor, group=group, without=options.without)
    return Written(draft, variant, graphs, coverage, params, layouts, here, place)


class StepProgram:
    """One variant of a compiled step: the program that Dynamo calls, made when it is first called."""

    def __init__(
        self, step: CompiledStep, variant: Variant, options: Options, clock: RuleClock, loss_of: Callable[..., Any]
    ) -> None:
        self._step, self.variant, self.options, self.clock = weakref.ref(step), variant, options, clock
        self._owned: list[Run] = []
        self._compiled = dynamo_compile(loss_of, self._backend, fullgraph=True, dynamic=options.dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The Dynamo backend of a whole step: write it, compile it."""
        step, options = self._step(), self.options
        assert step is not None
        group = group_of(step.ranks, options)
        if group is None:
            check_still_alone()
        held = {id(p) for group in step.optimizers.param_groups for p in group["params"]}
        step.noted.note(step.model, *recurrence(gm), held)
        with shown(f"compiling the {self.variant.name} program of {type(step.model).__name__}"):
            written = write_whole_step(step, self.variant, options, group, gm, inputs)
            with plain_tracing():
                passes = closing(written.draft, group, options.without)
                compiled = compile_graph(written.whole.module, options.compiler, written.graphs.code, *passes)
        if written.draft.update is not None:
            step.follow_branches(written.draft.update.branches)
        written.coverage.switch = step.mkor.switch
        step.variants[self.variant.name] = written.graphs
        written.coverage.graphs.captured += step.variants.values()
        step.compilations += 1
        plan = ""
        if group is not None:
            owners = options.placement if group.row is None else written.draft.plan.owners
            about = {"variant": self.variant.name, "owners": owners}
            plan = plan_of(written.whole, step.optimizers, written.trained, options, **about)
        self._owned.append(Run(step, self.clock, written, compiled, plan))
        return held_weakly(self._owned[-1])


def on_device(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Stand-ins for tensors that will be on ``device``, without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {key: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for key, t in state.items()}
