"""Training in several processes: options, the process group, and the plan that all ranks must share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .config import Options
from .graphs import Graphs
from .ir import Site, StepGraph, fake_value
from .passes.capture import dynamo_tensors
from .passes.collectives import Group, Sizes, describe
from .passes.drop_in import Job
from .passes.placement import Load, assign
from .passes.rewrite import Layout
from .rules import Rule
from .runtime.optimizer import numbers_of, read_number, tensor_state
from .runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Communication:
    """How ranks combine their work.

    Args:
        statistics_bytes, gradient_bytes: a bucket that holds as much is sent.
        statistics_dtype: dtype in which statistics travel; None is that in which they are summed (float32). Counts and
            noise levels keep theirs.
        average: ``"ranks"``: every rank's loss weighs the same, as under DistributedDataParallel. ``"rows"``: each weighs
            as its number of rows, the first dimension of the step's last tensor argument: equal to one process also where
            batches differ in size.
        padding: with owners, how many bytes of gradients may be padding, as a part of all gradients of preconditioned
            weights. A weight that would need more (one that is larger than a rank's share) stays on every rank.
        check_replicas_every: steps between checks that parameters, buffers, factors and optimizer state are bitwise equal
            on all ranks; 0 is never.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    statistics_bytes: int = 128 << 10
    gradient_bytes: int = 25 << 20
    statistics_dtype: torch.dtype | None = None
    average: Literal["ranks", "rows"] = "ranks"
    padding: float = 0.15
    check_replicas_every: int = 0
    sizes: Sizes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("statistics_bytes", 1), ("gradient_bytes", 1), ("check_replicas_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Communication({name}={value!r}): must be an integer of at least {least}")
        if not isinstance(self.padding, (int, float)) or not self.padding >= 0:
            raise ValueError(f"Communication(padding={self.padding!r}): must be a number, at least 0")
        if self.average not in ("ranks", "rows"):
            raise ValueError(f"Communication(average={self.average!r}): must be 'ranks' or 'rows'")
        if self.statistics_dtype is not None and not self.statistics_dtype.is_floating_point:
            raise ValueError(f"Communication(statistics_dtype={self.statistics_dtype}): must be a floating-point dtype")
        sizes = Sizes(self.statistics_bytes, self.gradient_bytes, self.statistics_dtype)
        object.__setattr__(self, "sizes", sizes)


def present_numbers(optimizer: Optimizer) -> str:
    """The optimizer's numbers as they are, a line each: equal on all ranks, but not for ever."""
    numbers = ((number, float(read_number(optimizer, number))) for number in numbers_of(optimizer))
    return "\n".join(f"{number.key} of group {number.group}: {value}" for number, value in numbers)


def plan_of_update(rule: Rule, jobs: Sequence[Job], options: Options, graphs: Graphs) -> str:
    """As ``plan_of``, of a program that runs at the optimizer's step."""
    lines = _chosen(rule, options)
    lines += [f"{job.name}: {job.layout}, refresh {job.refresh}" for job in jobs]
    return "\n".join([*lines, *describe(graphs["schedule"].graph)])


def _chosen(rule: Rule | None, options: Options) -> list[str]:
    about = f"refresh_every {options.refresh_every}, skip {options.skip}, backend {options.backend}"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads", f"rule {rule}", about]


def find_ranks(process_group: dist.ProcessGroup | None) -> Ranks | None:
    """The given group's ranks, the world's where torch.distributed is initialised, or None: one process.

    Raises:
        ValueError: no group, or one that this process is not in.
    """
    ready = dist.is_available() and dist.is_initialized()
    if process_group is None:
        return Ranks(dist.group.WORLD) if ready else None  # type: ignore[arg-type]
    if not ready or not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"process_group={process_group!r}: must be a torch.distributed process group, initialised")
    if dist.get_rank(process_group) < 0:
        raise ValueError("process_group: this process is not a member of it")
    return Ranks(process_group)


def group_of(ranks: Ranks | None, communication: Communication) -> Group | None:
    return None if ranks is None else Group(ranks.name, ranks.size, communication.sizes, ranks.rank)


def owners_of(
    step: StepGraph,
    rule: Rule,
    placement: str,
    group: Group | None,
    padding: float,
    known: Mapping[str, int | None],
) -> dict[str, int | None]:
    """The rank that keeps each weight's factors, by name; None: every rank. Owners that are ``known`` stay."""
    names = {site.parameter.name: site for site in step.sites.values()}
    if placement == "replicated" or group is None or group.size == 1:
        return dict.fromkeys(names)
    return assign({name: _load(site, rule) for name, site in names.items()}, group.size, padding, known)


def check_stale(rule: Rule | None, options: Options, communication: Communication) -> None:
    """Raises ValueError for what cannot be one step late."""
    if options.stale and rule is not None and rule.reads_gradient:
        raise ValueError(
            f"stale=1 delays what crosses the network, but {rule} also refreshes from the gradient of its own step: use "
            "stale=0, or a rule of statistics alone"
        )
    if options.stale and communication.statistics_dtype is not None:
        raise ValueError("stale=1 hides the statistics' transfer: leave Communication(statistics_dtype) at None")


def _load(site: Site, rule: Rule) -> Load:
    value, shape = fake_value(site.parameter.node), Layout.of(site).shape
    sides = [factor.shape[-1] for factor in rule.init(shape, torch.device("meta")).values() if factor.dim()]
    bias = 0 if site.bias is None else fake_value(site.bias.node).numel()
    return Load(value.numel() * sum(sides), (value.numel() + bias) * value.element_size())


def without_ddp(model: nn.Module, process_group: dist.ProcessGroup | None) -> tuple[nn.Module, Any]:
    """The module inside a DistributedDataParallel, and the process group to use: its own unless another is given.

    Raises:
        ValueError: the wrapper has been told to do what a compiled step does itself.
    """
    if not isinstance(model, DistributedDataParallel):
        return model, process_group
    asked = {
        "a communication hook": bool(model._comm_hooks),
        "find_unused_parameters=True": model.find_unused_parameters,
        "mixed_precision": model.mixed_precision is not None,
        "join": model._join_config.enable,
    }
    for what, there in asked.items():
        if there:
            raise ValueError(
                f"compile_step writes its own collectives and cannot honour DistributedDataParallel's {what}: pass the "
                "module inside, or use mkor_fx.compile with your own loop"
            )
    return model.module, process_group or model.process_group


def inside_ddp(ddp: DistributedDataParallel, handle: nn.Module) -> nn.Module:
    """Another instance of the wrapper around the compiled ``handle`` of its module, with the handle's attributes."""
    outer = object.__new__(type(ddp))
    outer.__dict__.update(ddp.__dict__, mkor=handle.mkor, graphs=handle.graphs, coverage=handle.coverage)
    outer.__dict__["_modules"] = {**ddp._modules, "module": handle}
    return outer


def check_sharding(model: nn.Module, precondition: str, *, whole_step: bool = False) -> None:
    """Preconditioning multiplies whole matrices, so it has to happen where gradients are whole.

    Raises:
        ValueError: parameters are sharded, and this way of preconditioning would not see their whole gradients.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError("FullyShardedDataParallel flattens parameters into vectors: use torch's fully_shard instead")
    if any(isinstance(module, FSDPModule) for module in modules):
        if precondition != "backward":
            raise ValueError(
                "fully_shard leaves each rank a part of every gradient, and preconditioning needs whole ones: use "
                "mkor_fx.compile(model, precondition='backward'), which sees them before they are scattered"
            )
        return
    parts = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if parts and whole_step:
        raise ValueError(
            f"{len(parts)} parameters are tensor-parallel ({parts[0]}, ...), and a compiled step does not know whose sum "
            "each of their gradients is: use mkor_fx.compile, which leaves these to the base optimizer"
        )


def check_still_alone() -> None:
    """A step that was made for one process must not go on silently in several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "torch.distributed was initialised after mkor_fx was called: ranks would train apart. Call init_process_group "
            "first"
        )


def buffer_names(gm: fx.GraphModule, model: nn.Module) -> dict[int, str]:
    """The model's buffers among the inputs of Dynamo's graph: position -> name."""
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    return {i: names[id(tensor)] for i, tensor in dynamo_tensors(gm).items() if id(tensor) in names}


def plan_of(
    step: StepGraph,
    optimizer: Optimizer,
    params: Sequence[nn.Parameter],
    rule: Rule | None,
    options: Options,
    **more: Any,
) -> str:
    """What all ranks must have in common, a line each: options, parameters and their roles, collectives in order."""
    lines = [*_chosen(rule, options), *(f"{key} {value}" for key, value in more.items())]
    lines += [f"optimizer {type(optimizer).__name__}, numbers {[*map(tuple, numbers_of(optimizer))]}"]
    lines += [f"optimizer state {[*map(list, (tensor_state(optimizer, p) for p in params))]}"]
    for index, parameter in step.parameters.items():
        role = step.role(index).value
        reason = f" ({step.declines[index].reason})" if index in step.declines else ""
        lines.append(f"{parameter.name} {list(parameter.shape)} {parameter.node.meta['val'].dtype}: {role}{reason}")
    return "\n".join([*lines, *describe(step.graph)])
