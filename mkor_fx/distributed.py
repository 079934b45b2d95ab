"""Training in several processes: options, the process group, and the plan that all ranks must share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.optim import Optimizer

from .config import Options
from .ir import StepGraph
from .passes.bucket import Sizes
from .passes.capture import dynamo_tensors
from .passes.collectives import describe
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
        check_replicas_every: steps between checks that parameters, buffers, factors and optimizer state are bitwise equal
            on all ranks; 0 is never.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    statistics_bytes: int = 128 << 10
    gradient_bytes: int = 25 << 20
    statistics_dtype: torch.dtype | None = None
    average: Literal["ranks", "rows"] = "ranks"
    check_replicas_every: int = 0
    sizes: Sizes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("statistics_bytes", 1), ("gradient_bytes", 1), ("check_replicas_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Communication({name}={value!r}): must be an integer of at least {least}")
        if self.average not in ("ranks", "rows"):
            raise ValueError(f"Communication(average={self.average!r}): must be 'ranks' or 'rows'")
        if self.statistics_dtype is not None and not self.statistics_dtype.is_floating_point:
            raise ValueError(f"Communication(statistics_dtype={self.statistics_dtype}): must be a floating-point dtype")
        sizes = Sizes(self.statistics_bytes, self.gradient_bytes, self.statistics_dtype)
        object.__setattr__(self, "sizes", sizes)


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


def check_still_alone() -> None:
    """A step that was made for one process must not go on silently in several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "torch.distributed was initialised after compile_step: ranks would train apart. Call init_process_group "
            "before compile_step"
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
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads", f"rule {rule}"]
    lines += [f"{key} {value}" for key, value in more.items()]
    lines += [f"refresh_every {options.refresh_every}, skip {options.skip}, backend {options.backend}"]
    lines += [f"optimizer {type(optimizer).__name__}"]
    for number in numbers_of(optimizer):
        lines.append(f"{number.key} of group {number.group}: {float(read_number(optimizer, number))}")
    lines += [f"optimizer state {[*map(list, (tensor_state(optimizer, p) for p in params))]}"]
    for index, parameter in step.parameters.items():
        role = step.role(index).value
        reason = f" ({step.declines[index].reason})" if index in step.declines else ""
        lines.append(f"{parameter.name} {list(parameter.shape)} {parameter.node.meta['val'].dtype}: {role}{reason}")
    return "\n".join([*lines, *describe(step.graph)])
