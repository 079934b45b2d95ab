"""What all ranks must have in common: the process group, who owns what, and the plan of each program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from ..ir import StepGraph, fake_value
from ..options import Options
from ..passes.match.layout import Layout
from ..passes.order.collectives import Group, describe
from ..passes.torch_api.dynamo import dynamo_tensors
from ..passes.write.placement import Load, apart, assign, assign_all
from ..passes.write.update_draft import Job
from ..rules.results import too_few_slots
from ..runtime.optimizer_state import numbers_of, read_number, tensor_state
from ..runtime.optimizers import Optimizers
from ..runtime.ranks import Ranks
from ..show.recorder import Recording


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


def check_gathering(options: Options, ranks: Ranks | None) -> Ranks | None:
    """The ranks, all of whose summaries find a slot.

    Raises:
        ValueError: a rule has fewer slots than there are ranks or parts of a batch.
    """
    there = {"ranks": 1 if ranks is None or ranks.alone else ranks.size, "micro-batches": options.accumulate}
    for rule in options.rules:
        for (what, count), slots in zip(there.items(), rule.gathers or ()):
            if count > slots:
                raise ValueError(too_few_slots(rule, what, slots, count))
    return ranks


def group_of(ranks: Ranks | None, options: Options) -> Group | None:
    """The ranks and, where each weight is kept by some of them, the grid that they stand in."""
    if ranks is None:
        return None
    sizes = options.communication.sizes
    whole = Group(ranks.name, ranks.size, sizes, ranks.rank)
    keepers = keepers_of(options.placement, ranks.size)
    if keepers == ranks.size:
        return whole
    if keepers == 1:
        return replace(whole, row=whole)
    row, column = (Group(part.name, part.size, sizes, part.rank) for part in ranks.grid(keepers))
    return replace(whole, row=row, column=column)


def keepers_of(placement: str | float, size: int) -> int:
    """How many of ``size`` ranks keep each weight's factors.

    Raises:
        ValueError: that is no whole number, or ranks cannot be divided by it.
    """
    if size == 1:
        return 1
    if isinstance(placement, str):
        return {"replicated": size, "owner": 1, "local": 1}[placement]
    keepers = round(placement * size)
    if keepers < 1 or abs(keepers - placement * size) > 1e-6 * size or size % keepers:
        possible = ", ".join(f"{n}/{size}" for n in range(1, size + 1) if size % n == 0)
        raise ValueError(
            f"placement={placement:g}: {placement * size:g} of {size} ranks would keep each weight, which must be a whole "
            f"number that divides them: use one of {possible}"
        )
    return keepers


def owners_of(
    step: StepGraph, options: Options, group: Group | None, known: Mapping[str, int | None]
) -> dict[str, int | None]:
    """The place in each row that keeps a weight's factors, by name; None: every rank. Owners that are ``known`` stay."""
    loads = loads_of(step)
    if group is None or group.row is None:
        return dict.fromkeys(loads)
    given = (loads, group.row.size, options.communication.padding, known)
    return assign_all(*given) if options.placement == "local" else assign(*given)


def apart_of(
    step: StepGraph, options: Options, group: Group | None, owners: Mapping[str, int | None]
) -> frozenset[str]:
    """The weights that every rank gets the gradient of though one keeps their factors, by name."""
    if options.placement != "local" or group is None or group.row is None:
        return frozenset()
    owned = {name: owner for name, owner in owners.items() if owner is not None}
    return frozenset(apart(loads_of(step), owned, group.size, options.communication.padding))


def loads_of(step: StepGraph) -> dict[str, Load]:
    """What owning each weight means, by name."""
    loads = {}
    for site in step.sites.values():
        bias = None if site.bias is None else fake_value(site.bias.node)
        loads[site.parameter.name] = load_of(Layout.of(site), fake_value(site.parameter.node), bias)
    return loads


def load_of(layout: Layout, weight: Tensor, bias: Tensor | None) -> Load:
    state = layout.fresh_state(torch.device("meta"))
    factors = [state[name] for name in layout.sides if name] or [t for t in state.values() if t.dim()]
    numbers = weight.numel() + (0 if bias is None else bias.numel())
    return Load(weight.numel() * sum(factor.shape[-1] for factor in factors), numbers * weight.element_size())


def buffer_names(gm: fx.GraphModule, model: nn.Module) -> dict[int, str]:
    """The model's buffers among the inputs of Dynamo's graph: position -> name."""
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    return {i: names[id(tensor)] for i, tensor in dynamo_tensors(gm).items() if id(tensor) in names}


# ---- plans ------------------------------------------------------------------------------------------------------------


def present_numbers(optimizer: Optimizers) -> str:
    """The optimizer's numbers as they are, a line each: equal on all ranks, but not for ever."""
    numbers = ((number, float(read_number(optimizer, number))) for number in numbers_of(optimizer))
    return "\n".join(f"{number.key} of group {number.group}: {value}" for number, value in numbers)


def plan_of_update(kind: str, jobs: Sequence[Job], options: Options, graphs: Recording) -> str:
    """As ``plan_of``, of a program that runs at the optimizer's step."""
    lines = [*_chosen(options), kind]
    lines += [f"{job.name}: {describe_layout(job.layout)}, refresh {job.refresh}, owner {job.owner}" for job in jobs]
    return "\n".join([*lines, *describe(graphs["schedule"].graph)])


def describe_layout(layout: Layout) -> str:
    """All of a layout that is alike in every process."""
    return f"{layout.view} {layout.kinds} bias {layout.bias} lookup {layout.lookup}"


def _chosen(options: Options) -> list[str]:
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads", f"rule {options.rules}", options.about]


def plan_of(
    step: StepGraph,
    optimizer: Optimizers,
    params: Sequence[nn.Parameter],
    options: Options,
    **more: Any,
) -> str:
    """What all ranks must have in common, a line each: options, parameters and their roles, collectives in order."""
    lines = [*_chosen(options), *(f"{key} {value}" for key, value in more.items())]
    lines += [f"optimizer {optimizer.names}, numbers {[*map(tuple, numbers_of(optimizer))]}"]
    lines += [f"optimizer state {[*map(list, (tensor_state(optimizer, p) for p in params))]}"]
    for index, parameter in step.parameters.items():
        role = step.role(index).value
        reason = f" ({step.declines[index].reason})" if index in step.declines else ""
        lines.append(f"{parameter.name} {list(parameter.shape)} {parameter.node.meta['val'].dtype}: {role}{reason}")
    return "\n".join([*lines, *describe(step.graph)])
