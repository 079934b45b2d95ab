"""A training step on ranks that are not there: written as ``compile_step`` writes it, then laid out in time by estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from ..options import Communication, Options
from ..passes.naming import Naming
from ..passes.order.collectives import Group, Message, is_start, is_wait
from ..passes.order.estimate import (
    DEVICES,
    Device,
    collective_milliseconds,
    fused_bytes,
    is_free,
    product_milliseconds,
    tensor_bytes,
    transfer_milliseconds,
)
from ..passes.order.schedule import is_heavy, order
from ..passes.pipeline import VARIANTS
from ..passes.torch_api.dynamo import dynamo_compile
from ..rules import MKOR, RuleChoice
from ..runtime.compiled_step import CompiledStep
from ..show.bubbles import Pipeline
from ..show.recorder import module_path, target_name
from ..show.timeline import COMMUNICATION, COMPUTE, Event, Simulation
from .agreement import keepers_of
from .checks import check_model, check_sharding, without_ddp
from .inversions import inversions
from .loss_function import loss_function
from .optimizer_checks import check_optimizer
from .option_checks import check_placement
from .run import Written
from .stages import filled_pipeline
from .whole_step import new_step, write_whole_step


def simulate(
    model: nn.Module,
    *batch: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: Optimizer | Sequence[Optimizer],
    world_size: int = 64,
    device: str = "h100",
    rule: RuleChoice = MKOR(),  # noqa: B008  (frozen)
    refresh: bool = True,
    skip: Sequence[str] = (),
    skip_nonfinite: bool = True,
    placement: Literal["replicated", "owner", "local"] | float = "replicated",
    communication: Communication = Communication(),  # noqa: B008  (frozen)
    pipeline: Pipeline | None = None,
    **kwargs: Any,
) -> Simulation:
    """Estimate how one step of ``compile_step`` would spend its time on ``world_size`` GPUs, without any of them.

    The step is captured on this process alone, with the collectives of ``world_size`` ranks in it, by the passes that
    ``compile_step`` runs; no process group is made or used, no tensor is computed, and model and optimizer are left as they
    are. A model made in a FakeTensorMode takes no memory. Durations are estimates from data sheets and models.

    Args:
        batch, kwargs: what one rank passes to its step.
        loss_fn, optimizer, rule, skip, skip_nonfinite, placement, communication: as in ``compile_step``. With owners it is
            rank 0 that is shown. What its rule derives outside of the program is listed with the rank that would do it.
        world_size: ranks, eight to a node.
        device: ``"a100"``, ``"h100"`` or ``"h200"``.
        refresh: a step that refreshes the factors, or one that reuses them.
        pipeline: lay the step out on stages as well, each of ``world_size / stages`` ranks, with what refreshes the factors
            in the bubbles (PipeFisher, Osawa, Li and Hoefler, 2023, arXiv 2211.14133): the batch is one micro-batch, and a
            stage an equal part of the model. A schedule alone: no door trains in stages.

    Returns:
        Simulation: prints as a table; ``to_html(path)``, ``to_chrome_trace(path)``.

    Raises:
        ValueError: bad options, or a step that ``compile_step`` refuses.
    """
    options = Options(rule=rule, skip=skip, skip_nonfinite=skip_nonfinite, placement=placement,
                      communication=communication)  # fmt: skip
    return simulate_step(model, batch, kwargs, loss_fn, optimizer, options, Machines(world_size, device, refresh, pipeline))


@dataclass(frozen=True)
class Machines:
    """Ranks that are not there, whether their step refreshes, and the stages that they stand in."""

    world_size: int
    device: str
    refresh: bool = True
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.world_size, int) or isinstance(self.world_size, bool) or self.world_size < 1:
            raise ValueError(f"world_size={self.world_size!r}: must be an integer of at least 1, the number of ranks")
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be one of {', '.join(map(repr, DEVICES))}")
        if self.pipeline is None:
            return
        if not isinstance(self.pipeline, Pipeline):
            raise ValueError(f"pipeline={self.pipeline!r}: must be a mkor_fx.Pipeline, or None")
        if not self.refresh:
            raise ValueError("refresh=False with a pipeline: a step that refreshes nothing has nothing to fill bubbles with")
        if self.world_size % self.pipeline.stages:
            raise ValueError(f"world_size={self.world_size}: must be a multiple of the {self.pipeline.stages} stages")

    @property
    def replicas(self) -> int:
        """Ranks that train the same weights."""
        return self.world_size if self.pipeline is None else self.world_size // self.pipeline.stages


def simulate_step(
    model: nn.Module,
    batch: tuple,
    kwargs: dict[str, Any],
    loss_fn: Callable[..., Tensor] | None,
    optimizer: Optimizer | Sequence[Optimizer],
    options: Options,
    machines: Machines,
) -> Simulation:
    """As :func:`simulate`, by the doors' options."""
    check_model(model)
    model, _ = without_ddp(model, None)
    check_sharding(model, "step", whole_step=True)
    check_optimizer(model, optimizer)
    if not batch and not kwargs:
        raise ValueError("nothing to trace: pass one rank's batch, simulate(model, *batch, optimizer=...)")
    Naming.of(model, options.skip, options.rules)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "parameters are on the meta device, where some operators have no gradient: make the model and the batch inside "
            "torch._subclasses.fake_tensor.FakeTensorMode(), which takes no memory either"
        )
    check_placement(options)
    group = _simulated(machines.replicas, options)
    written = trace_step(model, batch, kwargs, loss_fn, optimizer, options, group, machines.refresh)
    graph = written.whole.graph
    if "schedule" not in options.without:
        order(graph)  # as Overlap does behind Inductor's own passes
    device = DEVICES[machines.device]
    events = list(lay_out(graph, _sizes(group), device, _products(written)))
    title = f"{type(model).__name__}: {written.variant.name} step"
    derived, filled = inversions(written, options, group, device), None
    if machines.pipeline is not None:
        filled = filled_pipeline(machines.pipeline, written, events, derived, options, group, device)
    return Simulation(title, machines.world_size, device, tuple(events), derived, filled)


def _simulated(size: int, options: Options) -> Group:
    """As ``group_of``, seen by the first of ``size`` ranks."""
    whole = Group("simulated", size, options.communication.sizes)
    keepers = keepers_of(options.placement, size)
    if keepers == size:
        return whole
    if keepers == 1:
        return replace(whole, row=whole)
    parts = ("simulated row", size // keepers), ("simulated column", keepers)
    row, column = (replace(whole, name=name, size=n) for name, n in parts)
    return replace(whole, row=row, column=column)


def _sizes(group: Group) -> dict[str, int]:
    """How many ranks take part in the collectives of each group, by name."""
    return {part.name: part.size for part in (group, group.row, group.column) if part is not None}


class _Captured(Exception):
    """Ends a capture: nothing of the captured function is to run."""


def trace_step(
    model: nn.Module,
    batch: tuple,
    kwargs: dict[str, Any],
    loss_fn: Callable[..., Tensor] | None,
    optimizer: Optimizer | Sequence[Optimizer],
    options: Options,
    group: Group,
    refresh: bool = True,
) -> Written:
    """What ``compile_step`` would compile for this batch and process group."""
    tracer = _Tracer(new_step(model, loss_fn, optimizer, options, None), options, group, refresh)
    loss_of = loss_function(model, loss_fn, return_outputs=False)
    try:
        with torch.enable_grad():
            dynamo_compile(loss_of, tracer.backend, fullgraph=True, dynamic=False)(*batch, **kwargs)
    except Exception as error:
        if not isinstance(getattr(error, "inner_exception", error), _Captured):
            raise
    if tracer.found is None:
        raise ValueError("nothing was captured: is torch.compile switched off (TORCH_COMPILE_DISABLE, set_stance)?")
    return tracer.found


class _Tracer:
    """A Dynamo backend that writes a step and compiles nothing."""

    def __init__(self, step: CompiledStep, options: Options, group: Group, refresh: bool) -> None:
        self.step, self.options, self.group = step, options, group
        self.variant = VARIANTS["plain" if not options.rules else "refresh" if refresh else "reuse"]
        self.found: Written | None = None

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.found = write_whole_step(self.step, self.variant, self.options, self.group, gm, inputs)
        raise _Captured


# ---- the schedule in time -------------------------------------------------------------------------------------------


def lay_out(graph: fx.Graph, ranks: Mapping[str, int], device: Device, products: dict[str, str]) -> Iterator[Event]:
    """The graph's nodes in their order on two lanes: computing one after the other, collectives one after the other.

    Computing stands still where it waits for a collective that is under way. Cheap nodes between two products, starts or
    waits count as one kernel; they are listed by label. ``ranks``: how many there are, by the name of a group. ``products``:
    parameters by the node that makes their gradient.
    """
    now = free = 0.0
    arrives: dict[fx.Node, Event] = {}
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for cheap, members in groupby(nodes, lambda node: not (is_start(node) or is_wait(node) or is_heavy(node))):
        if cheap:
            moved = fused_bytes(members)
            paid = [node for node in moved if not is_free(node)]
            for label, block in groupby(paid, lambda node: _label(node, products)):
                own = list(block)
                size = sum(moved[node] for node in own)
                duration = transfer_milliseconds(size, device)
                yield Event(COMPUTE, _ops(own), label, _phase(own[0]), now, duration, size)
                now += duration
            continue
        for node in members:
            if is_start(node):
                begin, duration = max(now, free), collective_milliseconds(node, ranks[node.args[-1]], device)
                messages = node.meta["mkor_messages"]
                event = Event(COMMUNICATION, target_name(node).removeprefix("_c10d_functional."), _carried(messages),
                              messages[0].kind, begin, duration, tensor_bytes(node.args[0]), now,
                              tuple(map(str, messages)))  # fmt: skip
                free, arrives[node] = begin + duration, event
                yield event
            elif is_wait(node):
                awaited = arrives[node.args[0]]
                awaited.exposed = max(0.0, awaited.end - now)
                yield Event(COMPUTE, "wait", awaited.label, "wait", now, awaited.exposed, awaited.bytes)
                now += awaited.exposed
            else:
                size = sum(map(tensor_bytes, {*node.all_input_nodes, node}))
                duration = product_milliseconds(node, device)
                yield Event(COMPUTE, target_name(node), _label(node, products), _phase(node), now, duration, size)
                now += duration


def _products(written: Written) -> dict[str, str]:
    found: dict[str, str] = {}
    for site in written.whole.sites.values():
        found |= {tap.node.name: f"gradient of {site.parameter.name}" for tap in site.taps}
    return found


def _label(node: fx.Node, products: dict[str, str]) -> str:
    return node.meta.get("mkor_fx") or products.get(node.name) or module_path(node)


def _phase(node: fx.Node) -> str:
    """What the node's time is counted under."""
    if label := node.meta.get("mkor_fx"):
        return "buckets" if label.endswith("over ranks") else label.rpartition(": ")[2]
    return "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"


def _ops(nodes: list[fx.Node]) -> str:
    names = list(dict.fromkeys(target_name(node).removeprefix("aten.").partition(".")[0] for node in nodes))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _carried(messages: list[Message]) -> str:
    """``gradient of 4.weight to 0.bias, 6 tensors``"""
    kinds = " and ".join(dict.fromkeys(message.kind for message in messages))
    names = list(dict.fromkeys(message.name for message in messages))
    return f"{kinds} of {names[0]}" + (f" to {names[-1]}, {len(messages)} tensors" if len(names) > 1 else "")
