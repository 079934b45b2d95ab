"""A simulated step cut into the stages of a pipeline, with its refresh in the bubbles."""

from __future__ import annotations

from collections.abc import Sequence

from ..options import Options
from ..passes.match.layout import Layout
from ..passes.order.collectives import Group
from ..passes.order.estimate import Device
from ..prims import accumulation_dtype
from ..show.bubbles import FilledPipeline, LayerWork, Pipeline, fill
from ..show.timeline import COMPUTE, Event, Inversion
from .inversions import estimated_speeds
from .run import Written


def filled_pipeline(
    pipeline: Pipeline,
    written: Written,
    events: Sequence[Event],
    inverted: Sequence[Inversion],
    options: Options,
    group: Group,
    device: Device,
) -> FilledPipeline:
    """Every stage takes an equal part of forward and backward, and as many of the preconditioned weights, in the order of
    the program.

    Raises:
        ValueError: there are fewer weights than stages.
    """
    names = {site.parameter.name: index for index, site in written.whole.sites.items()}
    if len(names) < pipeline.stages:
        raise ValueError(f"{len(names)} weights are preconditioned, fewer than {pipeline.stages} stages")
    spent: dict[tuple[str, str], float] = {}
    for event in events:
        if event.lane == COMPUTE and event.op != "wait":
            at = (event.phase, event.label if event.phase == "statistics" else "")
            spent[at] = spent.get(at, 0.0) + event.duration
    speeds = options.communication.speeds or estimated_speeds(device, group.size)
    derived = {one.name: one for one in inverted}
    layers: dict[int, list[LayerWork]] = {}
    for number, (name, index) in enumerate(names.items()):
        layout, dtype = written.layouts[index], accumulation_dtype(written.params[index].dtype)
        curvature = spent.get(("statistics", f"{name}: statistics"), 0.0)
        sent = sum(layout.vector_size(kind) for kind in layout.kinds) * dtype.itemsize
        sync = 0.0 if group.size == 1 or written.draft.plan.local else 1e3 * speeds.all_reduce(sent)
        inverse = derived[name].derive_ms if name in derived else 0.0
        side = _share_of_inputs(layout)
        of_inputs = _share_inverted(layout, derived[name]) if name in derived else 0.0
        layers.setdefault(number * pipeline.stages // len(names), []).append(
            LayerWork(name, _split(curvature, side), _split(sync, side), _split(inverse, of_inputs))
        )
    forward, backward = (spent.get((phase, ""), 0.0) / pipeline.stages for phase in ("forward", "backward"))
    return fill(pipeline, forward, backward, layers)


def _share_of_inputs(layout: Layout) -> float:
    """``I^2 / (I^2 + O^2)``: the inputs' part of two factors."""
    squares = layout.shape.I**2, layout.shape.O**2
    return squares[0] / sum(squares)


def _share_inverted(layout: Layout, one: Inversion) -> float:
    """By ``d^3`` of its matrices, those of as many rows as there are inputs."""
    total = sum(rows**3 for rows in one.rows)
    equal = layout.shape.I == layout.shape.O
    return 0.5 if equal or not total else sum(rows**3 for rows in one.rows if rows == layout.shape.I) / total


def _split(duration: float, share: float) -> tuple[float, float]:
    return duration * share, duration * (1 - share)
