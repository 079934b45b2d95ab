"""The two doors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .doors.agreement import check_gathering, find_ranks
from .doors.checks import (
    check_gradient_hooks,
    check_loss,
    check_materialised,
    check_model,
    check_not_compiled,
    check_sharding,
    without_ddp,
)
from .doors.drop_in import DropIn
from .doors.handle import inside_ddp, plain_model
from .doors.optimizer_checks import check_optimizer
from .doors.option_checks import check_cuda_graphs, check_drop_in, check_late, check_placement, check_spread
from .doors.whole_step import new_step
from .options import Communication, Options
from .passes.naming import Naming
from .rules import MKOR, RuleChoice
from .runtime.compiled_step import CompiledStep


def compile(
    model: nn.Module,
    rule: RuleChoice = MKOR(),  # noqa: B008  (frozen)
    *,
    refresh_every: int = 1,
    refresh_phases: int = 1,
    derive: Literal["together", "spread"] = "together",
    skip: Sequence[str] = (),
    precondition: Literal["step", "backward"] = "step",
    process_group: ProcessGroup | None = None,
    placement: Literal["replicated", "local"] = "replicated",
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

    Everything else is the model's own: attributes set on one of the two, modes and counters are seen on the other. The
    handle has ``mkor`` (the factors: ``state_dict()``, ``load_state_dict()``), ``graphs`` and ``coverage``.

    The outermost step of an optimizer that holds a weight preconditions it, once. A weight that comes to a step without
    statistics is warned of, once, by name. A model that has changed is compiled again with one message.

    Args:
        model: any module, graph breaks included.
        rule: the update rule of every weight; or a dict of rules by glob pattern of parameter names, the first that matches
            decides, None leaves a weight alone, and one that no pattern names is left alone as well. A bias goes with its
            weight.
        refresh_every: steps per factor refresh; the first step refreshes.
        refresh_phases: 1: all weights refresh at the same step. ``p > 1``: in turns, at ``p`` evenly spaced ones of
            ``refresh_every``, so that no step is much longer than another: those of phase ``k`` where
            ``step + k * refresh_every // p`` is a multiple of ``refresh_every``, and all at the first step; what is derived
            likewise. Phases cost about the same, counted from the shapes of their weights. Each has an update program of
            its own, compiled at its first turn.
        derive: when rules derive what they do outside of the step's program, inverses and decompositions, every
            ``derive_every`` steps:
            ``"together"``, all behind the first step of a window; ``"spread"``, over the steps of the window, about as much
            behind each (PipeFisher, Osawa, Li and Hoefler, 2023, arXiv 2211.14133). Results are the same, of the state at
            the window's first step, which is put by and saved with the factors; each weight's is used once it is there.
            Those of step 0 are made at once.
        skip: glob patterns of parameter names that keep their raw gradient.
        precondition: ``"step"``: at the optimizer's step, on gradients that are accumulated, averaged and clipped.
            ``"backward"``: inside the backward, so that ``.grad`` arrives preconditioned; for loops without a torch
            optimizer. It uses the factors from before the step and the last step's norms for the rescale, and takes rules
            that only multiply, as ``MKOR.published()``.
        process_group: ranks that train together; None is the world where torch.distributed is initialised, or that of the
            DistributedDataParallel. Gradients are the wrapper's business (inside or outside of ``compile``) or yours;
            statistics are summed once an optimizer step, whatever number of micro-batches it has.
        placement: ``"replicated"``: every rank keeps all factors. ``"local"``: as in :func:`compile_step`, where each
            weight's owner broadcasts its direction at the optimizer's step; every rank's backward still takes all
            statistics.
        communication: buckets and checks; ``average`` must be as the gradients', the mean over ranks. What concerns
            gradients is refused.
        backend: ``"inductor"``, or ``"eager"`` to run the rewritten graphs uncompiled.
        dynamic, fullgraph, mode, options: as in torch.compile.

    Raises:
        ValueError: bad options, or a model with nothing to train; nothing is changed.
    """
    chosen = Options(
        rule=rule,
        refresh_every=refresh_every,
        refresh_phases=refresh_phases,
        derive=derive,
        skip=skip,
        precondition=precondition,
        process_group=process_group,
        placement=placement,
        communication=communication,
        backend=backend,
        dynamic=dynamic,
        fullgraph=fullgraph,
        mode=mode,
        options=options,
    )
    return compiled_model(model, chosen)


def compiled_model(model: nn.Module, options: Options) -> nn.Module:
    """As :func:`compile`, by the doors' options."""
    check_model(model)
    check_not_compiled(model)
    model = plain_model(model)
    if not options.rules:
        raise ValueError("rule=None: without a rule there is nothing to add; use torch.compile(model)")
    check_drop_in(options)
    inner, group = model, options.process_group
    if isinstance(model, DistributedDataParallel):
        inner, group = model.module, group or model.process_group
    check_sharding(inner, options.precondition)
    handle = DropIn(inner, options, check_gathering(options, find_ranks(group))).handle
    return inside_ddp(model, handle) if isinstance(model, DistributedDataParallel) else handle


def compile_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    optimizer: Optimizer | Sequence[Optimizer],
    rule: RuleChoice = MKOR(),  # noqa: B008  (frozen)
    *,
    refresh_every: int = 1,
    refresh_phases: int = 1,
    derive: Literal["together", "spread"] = "together",
    skip: Sequence[str] = (),
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    skip_nonfinite: bool = True,
    process_group: ProcessGroup | None = None,
    placement: Literal["replicated", "owner", "local"] | float = "replicated",
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
    in variants with and without a refresh, with no host synchronisation inside. The optimizer stays live: its
    ``state_dict``, its ``param_groups`` and learning-rate schedulers act on the compiled step, and a changing number
    compiles nothing again. Parameters' ``.grad`` is neither read nor written.

    Args:
        model: what is trained. Its buffers are updated as in eager training.
        loss_fn: ``loss_fn(outputs, target) -> scalar``; the last positional argument of the step is the target, the rest
            goes to the model. ``None`` passes everything to a model that returns its own loss (a scalar, an object with
            ``.loss``, or a tuple that begins with it).
        optimizer: a torch.optim optimizer over parameters of ``model``, or several, each with its own, as
            ``[Muon(...), AdamW(...)]``.
        rule: as in :func:`compile`; ``None`` is the plain compiled step; a ``Hybrid`` leaves its rule where the loss says
            so, for which the host waits once a window (``step.mkor.switch`` tells).
        refresh_every: steps per factor refresh; the first step refreshes.
        refresh_phases: as in :func:`compile`. Each phase is a program of the whole step, compiled at its first turn: with
            ``p`` of them ``p + 1`` in place of two (``p + 2`` where ``p < refresh_every``), which compile as much longer.
            With ``placement="owner"`` phases are even over all weights, not over each owner's.
        derive: as in :func:`compile`.
        skip: glob patterns of parameter names that keep their raw gradient.
        accumulate: parts in which each batch is run, for its memory: all arguments with as many rows as the target are cut
            along their first dimension, the last part may be smaller, and the step is that of the whole batch with the mean
            loss over its rows. Random signs are drawn anew in each part.
        clip_norm: as ``torch.nn.utils.clip_grad_norm_`` in front of an optimizer's step: all gradients are shortened by one
            factor where their norm together is larger. ``step.metrics()["gradient_norm"]`` is that norm, unclipped.
        ema: keep exponential moving averages ``A <- ema A + (1 - ema) W`` of the weights behind each step, as
            ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(ema)``; ``with step.ema.applied():`` puts
            them into the model.
        skip_nonfinite: a step whose loss or gradients are not finite changes nothing at all (``step.skipped`` counts).
        process_group: ranks that train together, each on its part of the batch; None is the world where
            torch.distributed is initialised. Parameters and buffers start as rank 0's, the loss is the mean over ranks.
        placement: ``"replicated"``: every rank keeps all factors. ``"owner"``: each weight's factors live on one rank,
            which gets its gradient and sends its direction back; memory and work of the factors are divided by the number
            of ranks. A share of the ranks, as 0.5: each weight's factors live on as many, and directions travel within a row
            of ranks in which every weight has one; KAISA's COMM-OPT, MEM-OPT and HYBRID (Pauloski et al., 2021,
            arXiv 2107.01739), all at the volume of an all-reduce. ``"local"``: as ``"owner"``, and the owner takes a
            weight's statistics from its own rank's rows alone, so that no statistic crosses the network (DP-KFAC, Zhang, Shi
            and Li, 2022, arXiv 2206.15143): factors of ``1 / R`` of the rows. One process has nothing to divide.
            ``step.mkor.owners`` says whose is what, ``step.mkor.state_dict()`` has this rank's part.
        stale: 0: a step's statistics refresh the factors that it uses. 1: those that the next step uses, so that their
            sum over ranks has a whole step to arrive. Not for rules that also read the gradient.
        communication: buckets, averaging, checks.
        return_outputs: return ``(loss, outputs)``, the model's outputs detached.
        backend: ``"inductor"``, or ``"eager"`` to run the rewritten graph uncompiled.
        dynamic, fullgraph, mode, options: as in torch.compile. A whole step needs ``fullgraph=True``, and none of the modes
            with CUDA graphs.

    Raises:
        ValueError: bad options, an optimizer over another model, a loss that is not a scalar; nothing is changed.
    """
    chosen = Options(
        rule=rule,
        refresh_every=refresh_every,
        refresh_phases=refresh_phases,
        derive=derive,
        skip=skip,
        accumulate=accumulate,
        clip_norm=clip_norm,
        ema=ema,
        skip_nonfinite=skip_nonfinite,
        process_group=process_group,
        placement=placement,
        stale=stale,
        communication=communication,
        return_outputs=return_outputs,
        backend=backend,
        dynamic=dynamic,
        fullgraph=fullgraph,
        mode=mode,
        options=options,
    )
    return compiled_step(model, loss_fn, optimizer, chosen)


def compiled_step(
    model: nn.Module, loss_fn: Callable[..., Tensor] | None, optimizer: Optimizer | Sequence[Optimizer], options: Options
) -> CompiledStep:
    """As :func:`compile_step`, by the doors' options."""
    if not options.fullgraph:
        raise ValueError(
            "compile_step compiles one graph and needs fullgraph=True; mkor_fx.compile handles graph breaks"
        )
    check_model(model)
    check_cuda_graphs(options)
    check_late(options)
    check_placement(options)
    check_spread(options)
    model, process_group = without_ddp(plain_model(model), options.process_group)
    check_sharding(model, "step", whole_step=True)
    check_materialised(model)
    check_loss(loss_fn)
    check_optimizer(model, optimizer)
    check_gradient_hooks(model.named_parameters())
    Naming.of(model, options.skip, options.rules)
    return new_step(model, loss_fn, optimizer, options, check_gathering(options, find_ranks(process_group)))
