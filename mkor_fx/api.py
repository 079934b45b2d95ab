"""The two doors, and the pipeline behind them on one screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from . import passes
from .config import Options, check_model, check_optimizer, check_rule
from .coverage import Coverage
from .graphs import Graphs
from .passes.capture import Naming, WholeStep, capture_whole_step, dynamo_parameters, own_code
from .passes.lower import compile_graph, plain_tracing
from .passes.optimizer import trace_update
from .passes.rewrite import Layout
from .passes.whole_step import StepWriter
from .rules import MKOR, Rule
from .runtime.optimizer import tensor_state
from .runtime.step import CompiledStep


def compile_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    optimizer: Optimizer,
    rule: Rule | None = MKOR(),  # noqa: B008  (frozen)
    *,
    refresh_every: int = 1,
    skip: Sequence[str] = (),
    skip_nonfinite: bool = True,
    return_outputs: bool = False,
    backend: str = "inductor",
    dynamic: bool | None = None,
    fullgraph: bool = True,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> CompiledStep:
    """One training step as one compiled program: ``step(*args, **kwargs) -> loss``.

    Forward, backward, statistics, factor refresh, preconditioning, rescale and the optimizer's own update are one graph,
    in two variants (with and without a refresh), with no host synchronisation inside. The optimizer stays live: its
    ``state_dict``, its ``param_groups`` and learning-rate schedulers act on the compiled step, and a changing number
    compiles nothing again. Parameters' ``.grad`` is neither read nor written.

    Args:
        model: what is trained. Its buffers are updated as in eager training.
        loss_fn: ``loss_fn(outputs, target) -> scalar``; the last positional argument of the step is the target, the rest
            goes to the model. ``None`` passes everything to a model that returns its own loss (a scalar, an object with
            ``.loss``, or a tuple that begins with it).
        optimizer: a torch.optim optimizer over parameters of ``model``.
        rule: the update rule; ``None`` is the plain compiled step.
        refresh_every: steps per factor refresh; the first step refreshes.
        skip: glob patterns of parameter names that keep their raw gradient.
        skip_nonfinite: a step whose loss or gradients are not finite changes nothing at all (``step.skipped`` counts).
        return_outputs: return ``(loss, outputs)``, the model's outputs detached.
        backend: ``"inductor"``, or ``"eager"`` to run the rewritten graph uncompiled.
        dynamic, fullgraph, mode, options: as in torch.compile. A whole step needs ``fullgraph=True``.

    Raises:
        ValueError: bad options, an optimizer over another model, a loss that is not a scalar; nothing is changed.
    """
    chosen = Options.of(skip, refresh_every=refresh_every, backend=backend, dynamic=dynamic, fullgraph=fullgraph, mode=mode,
                        options=options)
    if not fullgraph:
        raise ValueError("compile_step compiles one graph and needs fullgraph=True; mkor_fx.compile handles graph breaks")
    check_model(model)
    if rule is not None:
        check_rule(rule)
    check_optimizer(model, optimizer)
    Naming.of(model, chosen.skip)
    loss_of = _loss_function(model, loss_fn, return_outputs)

    def build(step: CompiledStep, refresh: bool) -> Callable[..., Any]:
        build_graph = partial(_build_whole_step, step, rule, refresh, chosen, skip_nonfinite)
        return torch.compile(loss_of, backend=build_graph, fullgraph=True, dynamic=dynamic)

    return CompiledStep(model, optimizer, build, refresh_every if rule is not None else 1)


def _loss_function(model: nn.Module, loss_fn: Callable | None, return_outputs: bool) -> Callable[..., Any]:
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


def _build_whole_step(
    step: CompiledStep, rule: Rule | None, refresh: bool, options: Options, skip_nonfinite: bool,
    gm: fx.GraphModule, example_inputs: Sequence[Any],
) -> Callable[..., Any]:
    """The Dynamo backend of a whole step: capture -> canonicalize -> match -> rewrite -> schedule -> lower."""
    naming = Naming.of(step.model, options.skip)
    held = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    params = {index: p for index, (_, p) in dynamo_parameters(gm, naming).items()}
    variant = "plain" if rule is None else "refresh" if refresh else "reuse"
    graphs, coverage = Graphs(f"{type(step.model).__name__}: {variant} step"), Coverage(step.model, rule)

    whole = capture_whole_step(gm, example_inputs, naming)
    for index, parameter in whole.parameters.items():
        if rule is None:
            parameter.excluded = "no rule: the plain step"
        elif id(params[index]) not in held:
            parameter.excluded = "the optimizer does not hold it"
    trained = {i: params[i] for i, p in whole.parameters.items() if p.grad is not None and id(params[i]) in held}
    if not trained:
        raise ValueError("no parameter that the optimizer holds gets a gradient from this loss")

    with plain_tracing():
        passes.analyse(whole, rule, graphs)
        coverage.add(whole)
        states = {
            index: step.mkor.create(params[index], partial(rule.init, Layout.of(site).shape))
            for index, site in whole.sites.items()
        }
        step.prepare_optimizer(list(trained.values()))
        update = trace_update(step.optimizer, list(trained.values()))
        device = next(iter(trained.values())).device
        writer = StepWriter(whole, params)

        def rewrite(_: WholeStep) -> None:
            writer.seed_with_one()
            directions = writer.precondition(rule, refresh, states, step.mkor.step_tensor(device))
            optimizer_states = {i: tensor_state(step.optimizer, p) for i, p in trained.items()}
            writer.apply(update, directions, optimizer_states, step.numbers(device))
            writer.finish(skip_nonfinite, step.skip_counter(device))

        passes.synthesise(whole, rewrite, graphs, inductor=False)
        compiled = compile_graph(whole.module, options.backend, options.inductor)

    step.follow_branches(update.branches)
    step.variants[variant], step.coverage = graphs, coverage
    step.compilations += 1

    def run(*args: Any) -> list[Any]:
        with plain_tracing():
            return compiled(*args, *(step.tensor(slot, args, device) for slot in writer.slots))

    return run
