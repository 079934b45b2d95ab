"""The two doors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .config import Options, check_model, check_optimizer, check_rule
from .distributed import Communication, check_sharding, check_stale, find_ranks, inside_ddp, without_ddp
from .drop_in import DropIn
from .passes.backend import facing_user
from .passes.capture import Naming
from .rules import MKOR, Rule
from .runtime.step import CompiledStep, Phase
from .whole_step import build_whole_step, loss_function


def compile(
    model: nn.Module,
    rule: Rule = MKOR(),  # noqa: B008  (frozen)
    *,
    refresh_every: int = 1,
    skip: Sequence[str] = (),
    precondition: Literal["step", "backward"] = "step",
    process_group: ProcessGroup | None = None,
    communication: Communication = Communication(),  # noqa: B008  (frozen)
    backend: str = "inductor",
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """``torch.compile(model)`` whose optimizer steps are second-order; the training loop stays as it is.

    Returns another handle of the same model: an instance of its class that shares its parameters, buffers and submodules
    (``state_dict`` keys are the user's own) and runs compiled. The backward graph also sums the statistics; when any
    ``torch.optim`` optimizer steps parameters of the model, one more compiled program refreshes the factors and hands it
    preconditioned gradients. ``.grad`` is the raw gradient again afterwards. Under ``no_grad`` nothing is added.

    The handle has ``mkor`` (the factors: ``state_dict()``, ``load_state_dict()``), ``graphs`` and ``coverage``.

    Args:
        model: any module, graph breaks included.
        rule: the update rule.
        refresh_every: steps per factor refresh; the first step refreshes.
        skip: glob patterns of parameter names that keep their raw gradient.
        precondition: ``"step"``: at the optimizer's step, on gradients that are accumulated, averaged and clipped.
            ``"backward"``: inside the backward, so that ``.grad`` arrives preconditioned; for loops without a torch
            optimizer. It uses the factors from before the step and the last step's norms for the rescale.
        process_group: ranks that train together; None is the world where torch.distributed is initialised, or that of the
            DistributedDataParallel. Gradients are the wrapper's business (inside or outside of ``compile``) or yours;
            statistics are summed once an optimizer step, whatever number of micro-batches it has.
        communication: buckets and checks; ``average`` must be as the gradients', the mean over ranks.
        backend: ``"inductor"``, or ``"eager"`` to run the rewritten graphs uncompiled.
        dynamic, fullgraph, mode, options: as in torch.compile.

    Raises:
        ValueError: bad options, or a model with nothing to train; nothing is changed.
    """
    chosen = Options(
        skip=skip,
        refresh_every=refresh_every,
        backend=backend,
        dynamic=dynamic,
        fullgraph=fullgraph,
        mode=mode,
        options=options,
    )
    check_model(model)
    check_rule(rule)
    if precondition not in ("step", "backward"):
        raise ValueError(f"precondition={precondition!r}: must be 'step' or 'backward'")
    inner, group = model, process_group
    if isinstance(model, DistributedDataParallel):
        inner, group = model.module, process_group or model.process_group
    if communication.average != "ranks":
        raise ValueError("Communication(average='rows') needs compile_step: here the gradients are averaged elsewhere")
    check_sharding(inner, precondition)
    handle = DropIn(inner, rule, chosen, precondition, find_ranks(group), communication).handle
    return inside_ddp(model, handle) if isinstance(model, DistributedDataParallel) else handle


def compile_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    optimizer: Optimizer,
    rule: Rule | None = MKOR(),  # noqa: B008  (frozen)
    *,
    refresh_every: int = 1,
    skip: Sequence[str] = (),
    skip_nonfinite: bool = True,
    process_group: ProcessGroup | None = None,
    placement: Literal["replicated", "owner"] = "replicated",
    stale: Literal[0, 1] = 0,
    communication: Communication = Communication(),  # noqa: B008  (frozen)
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
        process_group: ranks that train together, each on its part of the batch; None is the world where
            torch.distributed is initialised. Parameters and buffers start as rank 0's, the loss is the mean over ranks.
        placement: ``"replicated"``: every rank keeps all factors. ``"owner"``: each weight's factors live on one rank,
            which gets its gradient and sends its direction back; memory and work of the factors are divided by the number
            of ranks. ``step.mkor.owners`` says whose is what, ``step.mkor.state_dict()`` has this rank's part.
        stale: 0: a step's statistics refresh the factors that it uses. 1: those that the next step uses, so that their
            sum over ranks has a whole step to arrive. Not for rules that also read the gradient.
        communication: buckets, averaging, checks.
        return_outputs: return ``(loss, outputs)``, the model's outputs detached.
        backend: ``"inductor"``, or ``"eager"`` to run the rewritten graph uncompiled.
        dynamic, fullgraph, mode, options: as in torch.compile. A whole step needs ``fullgraph=True``.

    Raises:
        ValueError: bad options, an optimizer over another model, a loss that is not a scalar; nothing is changed.
    """
    chosen = Options(
        skip=skip,
        refresh_every=refresh_every,
        backend=backend,
        dynamic=dynamic,
        fullgraph=fullgraph,
        mode=mode,
        options=options,
        placement=placement,
        stale=stale,
    )
    if not fullgraph:
        raise ValueError(
            "compile_step compiles one graph and needs fullgraph=True; mkor_fx.compile handles graph breaks"
        )
    check_model(model)
    if rule is not None:
        check_rule(rule)
    check_stale(rule, chosen, communication)
    model, process_group = without_ddp(model, process_group)
    check_sharding(model, "step", whole_step=True)
    check_optimizer(model, optimizer)
    Naming.of(model, chosen.skip)
    loss_of = loss_function(model, loss_fn, return_outputs)

    def build(step: CompiledStep, phase: Phase) -> Callable[..., Any]:
        def mkor_fx(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return build_whole_step(step, rule, phase, chosen, skip_nonfinite, communication, gm, inputs)

        return facing_user(torch.compile(loss_of, backend=mkor_fx, fullgraph=True, dynamic=dynamic))

    every = refresh_every if rule is not None else 1
    ranks = find_ranks(process_group)
    return CompiledStep(model, optimizer, build, every, ranks, communication.check_replicas_every, stale)
