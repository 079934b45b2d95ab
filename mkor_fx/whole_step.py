"""Behind ``compile_step``: the Dynamo backend whose callable is the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from . import reasons
from .config import Options
from .coverage import Coverage
from .distributed import (
    Communication,
    buffer_names,
    check_still_alone,
    group_of,
    owners_of,
    plan_of,
    present_numbers,
)
from .graphs import Graphs
from .passes.backend import compile_graph, plain_tracing
from .passes.capture import Naming, WholeStep, capture_whole_step, dynamo_parameters, own_code, trace_artifact
from .passes.collectives import Group, Network
from .passes.late import Refresh, buffers_of, nothing, refresh_now
from .passes.optimizer import Update, trace_update
from .passes.pin import Overlap
from .passes.pipeline import analyse, synthesise
from .passes.rewrite import Layout
from .passes.whole_step import StepWriter
from .rules import Rule
from .runtime.optimizer import tensor_state
from .runtime.step import CompiledStep, Phase


def loss_function(model: nn.Module, loss_fn: Callable | None, return_outputs: bool) -> Callable[..., Any]:
    """What Dynamo captures: the loss first, then whatever else is wanted, detached."""

    def loss_of(*args: Any, **kwargs: Any) -> Any:
        if loss_fn is None:
            outputs = model(*args, **kwargs)
            if isinstance(outputs, Tensor):
                loss = outputs
            elif isinstance(outputs, (tuple, list)):
                loss = outputs[0]
            else:
                loss = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
        else:
            outputs = model(*args[:-1], **kwargs)
            loss = loss_fn(outputs, args[-1])
        if return_outputs:
            return loss, pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        return loss

    return own_code(loss_of)


@dataclass(frozen=True)
class Written:
    """One variant of the whole step as a lowered graph, not yet compiled.

    ``trained``: parameters by input position; ``kept``: the sites whose factors are on this rank; ``late``: buffers of
    statistics that the next step awaits.
    """

    whole: WholeStep
    variant: str
    graphs: Graphs
    coverage: Coverage
    update: Update
    trained: dict[int, nn.Parameter]
    kept: dict[int, nn.Parameter]
    owners: dict[str, int | None]
    late: Any
    writer: StepWriter
    device: torch.device


def write_whole_step(
    step: CompiledStep,
    rule: Rule | None,
    phase: Phase,
    options: Options,
    skip_nonfinite: bool,
    communication: Communication,
    group: Group | None,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
) -> Written:
    """capture -> canonicalize -> match -> rewrite -> schedule -> lower, of Dynamo's graph ``gm``."""
    naming = Naming.of(step.model, options.skip)
    held = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    params = {index: p for index, (_, p) in dynamo_parameters(gm, naming).items()}
    variant = "plain" if rule is None else phase.name
    coverage = Coverage(step.model, rule)
    graphs = Graphs(f"{type(step.model).__name__}: {variant} step", coverage)

    whole = capture_whole_step(gm, example_inputs, naming)
    for index, parameter in whole.parameters.items():
        if rule is None:
            parameter.excluded = reasons.NO_RULE
        elif id(params[index]) not in held:
            parameter.excluded = reasons.NOT_HELD
    trained = {i: params[i] for i, p in whole.parameters.items() if p.grad is not None and id(params[i]) in held}
    if not trained:
        raise ValueError("no parameter that the optimizer holds gets a gradient from this loss")

    with plain_tracing():
        analyse(whole, rule, graphs)
        coverage.add(whole)
        trace_artifact("mkor_fx_coverage", coverage.to_json)
        owners: dict[str, int | None] = {}
        if rule is not None:
            owners = owners_of(whole, rule, options.placement, group, communication.padding, step.mkor.owners)
        fresh = {params[i]: Layout.of(site).fresh_state(rule) for i, site in whole.sites.items() if rule is not None}
        step.mkor.place(owners, fresh, 0 if group is None else group.rank)
        states = {index: step.mkor.of(params[index]) for index in whole.sites if step.mkor.holds(params[index])}
        step.prepare_optimizer(list(trained.values()))
        update = trace_update(step.optimizer, list(trained.values()))
        device = next(iter(trained.values())).device
        network = None if group is None else Network(whole.graph, group)
        writer = StepWriter(whole, network, buffer_names(gm, step.model), owners)
        late = buffers_of(whole, rule) if rule is not None and options.stale else ()

        def rewrite(_: WholeStep) -> None:
            writer.seed(step.rows(device) if communication.average == "rows" else None)
            directions = writer.take_gradients(list(trained))
            if rule is not None:
                statistics = writer.statistics(rule, *phase, late)
                directions |= writer.precondition(
                    rule, phase.refresh, states, statistics, step.mkor.step_tensor(device)
                )
            optimizer_states = {i: tensor_state(step.optimizer, p) for i, p in trained.items()}
            writer.apply(update, directions, optimizer_states, step.numbers(device))
            writer.finish(skip_nonfinite, step.skip_counter(device))

        synthesise(whole, rewrite, graphs, inductor=False, group=group)
    kept = {index: params[index] for index in states}
    return Written(whole, variant, graphs, coverage, update, trained, kept, owners, late, writer, device)


def build_whole_step(
    step: CompiledStep,
    rule: Rule | None,
    phase: Phase,
    options: Options,
    skip_nonfinite: bool,
    communication: Communication,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
) -> Callable[..., Any]:
    """The Dynamo backend of a whole step: write it, compile it."""
    group = group_of(step.ranks, communication)
    if group is None:
        check_still_alone()
    written = write_whole_step(step, rule, phase, options, skip_nonfinite, communication, group, gm, example_inputs)
    whole, graphs, variant, device = written.whole, written.graphs, written.variant, written.device
    writer, late = written.writer, written.late
    with plain_tracing():
        keep_order = None if group is None else Overlap()
        compiled = compile_graph(whole.module, options.backend, options.inductor, graphs.code, keep_order)

    step.follow_branches(written.update.branches)
    step.variants[variant], step.coverage = graphs, written.coverage
    written.coverage.graphs.captured += step.variants.values()
    step.compilations += 1

    plan = ""
    if group is not None:
        about = {"skip_nonfinite": skip_nonfinite, "communication": communication, "stale": options.stale}
        about["owners"] = written.owners if options.placement == "owner" else options.placement
        trained = list(written.trained.values())
        plan = plan_of(whole, step.optimizer, trained, rule, options, variant=variant, **about)

    refreshes = {step.mkor.name(param): Refresh.of(whole.sites[i]) for i, param in written.kept.items() if late}

    def settle(tensors: list[Tensor]) -> dict[str, Tensor]:
        assert rule is not None
        taken, *buffers = tensors
        if not taken:
            return {}
        factors = {step.mkor.name(param): step.mkor.of(param) for param in written.kept.values()}
        new = refresh_now(rule, refreshes, late, buffers, factors, step.mkor.step - 1)
        return {f"{name}.{key}": t for name, state in new.items() for key, t in state.items()}

    def run(*args: Any) -> list[Any]:
        step.begin(variant, plan, present_numbers)
        with plain_tracing():
            waiting = step.late.take(late, lambda: nothing(late, device)) if late and phase.refresh else []
            outputs = compiled(*args, *(step.tensor(slot, args, device, waiting) for slot in writer.slots))
        if late:
            step.late.clear()
        if late and phase.collect:
            outputs, sent = outputs[: writer.results], list(outputs[writer.results :])
            step.late.put(sent, late, settle)
        return outputs

    return run
