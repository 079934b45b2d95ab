"""Second-order work in the bubbles of a pipeline: a schedule, nothing runs (PipeFisher, Osawa, Li and Hoefler, 2023, arXiv
2211.14133)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .costs import aligned

#: how much longer than an item a gap has to be
SLACK = 1.05


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages of a model on as many groups of ranks, through which the micro-batches of a step pass.

    Args:
        stages: parts of the model, one behind the other, 1 or more.
        micro_batches: of a step, 1 or more.
        schedule: ``"gpipe"``: all forwards, then all backwards. ``"1f1b"``: a stage goes on with a backward as soon as there
            is one, as long in all, with fewer activations held. ``"chimera"``: two pipelines of opposite directions, each
            with half of the micro-batches; every rank has a stage of both. Stages are even, and there are as many
            micro-batches.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    stages: int
    micro_batches: int
    schedule: Literal["gpipe", "1f1b", "chimera"] = "gpipe"

    def __post_init__(self) -> None:
        for name in ("stages", "micro_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Pipeline({name}={value!r}): must be an integer of at least 1")
        if self.schedule not in ("gpipe", "1f1b", "chimera"):
            raise ValueError(f"Pipeline(schedule={self.schedule!r}): must be 'gpipe', '1f1b' or 'chimera'")
        if self.schedule == "chimera" and (self.stages % 2 or self.micro_batches != self.stages):
            raise ValueError(
                f"Pipeline(stages={self.stages}, micro_batches={self.micro_batches}, schedule='chimera'): stages must be "
                "even and as many as micro-batches, of which half go each way: the unit that Chimera repeats"
            )


class Slot(NamedTuple):
    """A piece of work on one ``rank`` of the pipeline: ``kind`` says of what, ``of`` whose. Times in the unit that was
    given."""

    rank: int
    kind: str
    of: str
    start: float
    duration: float
    micro_batch: int | None = None

    @property
    def end(self) -> float:
        return self.start + self.duration


class LayerWork(NamedTuple):
    """What refreshing one layer takes: of both factors, ``R`` of inputs and ``L`` of output gradients, the statistics of one
    micro-batch, their sum over ranks, the inversion."""

    name: str
    curvature: tuple[float, float]
    sync: tuple[float, float]
    inverse: tuple[float, float]


@dataclass(frozen=True)
class FilledPipeline:
    """A refresh of all layers in the bubbles of one or several steps, and what did not fit behind the last.

    ``items`` are forwards, backwards and the refresh, of all ``steps``, one step behind the other; ``step`` is how long a
    step takes without second-order work, ``end`` when the last item ends, of the pipeline and of what was appended.
    """

    pipeline: Pipeline
    step: float
    steps: int
    items: tuple[Slot, ...]
    appended: int

    @property
    def end(self) -> float:
        return max((item.end for item in self.items), default=0.0)

    @property
    def utilisation(self) -> float:
        """Share of the time that ranks compute, while a refresh is under way."""
        length = max(self.end, self.steps * self.step) * self.pipeline.stages
        return sum(item.duration for item in self.items) / length if length else 1.0

    @property
    def utilisation_without(self) -> float:
        """The same of forwards and backwards alone: ``M / (M + S - 1)`` of both first schedules."""
        own = sum(item.duration for item in self.items if item.kind in ("forward", "backward"))
        return own / (self.steps * self.step * self.pipeline.stages) if self.step else 1.0

    def lane(self, rank: int) -> list[Slot]:
        """What one rank does, in order."""
        return sorted((item for item in self.items if item.rank == rank), key=lambda item: item.start)

    def table(self) -> str:
        """A line for each rank: how long it computes by kind, over a refresh."""
        kinds = list(dict.fromkeys(item.kind for item in self.items))
        rows = [
            [f"stage {rank}", *(f"{sum(i.duration for i in self.lane(rank) if i.kind == kind):.3f}" for kind in kinds)]
            for rank in range(self.pipeline.stages)
        ]
        about = self.pipeline
        return (
            f"{about.schedule} of {about.stages} stages and {about.micro_batches} micro-batches (estimated): a refresh "
            f"takes {self.steps} step{'s' * (self.steps > 1)} of {self.step:.3f} ms, {self.appended} pieces behind the "
            f"last; utilisation {self.utilisation_without:.1%} without it, {self.utilisation:.1%} with it\n"
        ) + aligned(rows, ["over a refresh", *(f"{kind} ms" for kind in kinds)], "l" + "r" * len(kinds))


def pipeline_step(pipeline: Pipeline, forward: float, backward: float) -> list[Slot]:
    """Forwards and backwards of one step, each of a micro-batch on one stage as long as on any other.

    A forward follows that of the stage before, a backward that of the stage behind. ``"gpipe"`` and ``"1f1b"`` take
    ``(M + S - 1) (forward + backward)``, ``"chimera"`` takes ``S forward + (2 S - 2) backward`` (Li and Hoefler, 2021, where
    a backward is no shorter than a forward).
    """
    S, M = pipeline.stages, pipeline.micro_batches
    if pipeline.schedule == "chimera":
        return _chimera(S, M, forward, backward)
    orders = []
    for stage in range(S):
        ahead = M if pipeline.schedule == "gpipe" else min(M, S - stage)
        order = [("forward", m) for m in range(ahead)]
        for m in range(M):
            order.append(("backward", m))
            order += [("forward", ahead + m)] if ahead + m < M else []
        orders.append(order)
    return _in_order(orders, forward, backward)


def _in_order(orders: Sequence[Sequence[tuple[str, int]]], forward: float, backward: float) -> list[Slot]:
    """Each stage does its own list as early as its neighbours let it."""
    S, ends = len(orders), dict[tuple[str, int, int], float]()
    free, at, items = [0.0] * S, [0] * S, list[Slot]()
    while any(at[s] < len(orders[s]) for s in range(S)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, m = order[at[stage]]
                needs = _needs(kind, stage, m, S)
                if needs is not None and needs not in ends:
                    break
                start = max(free[stage], 0.0 if needs is None else ends[needs])
                item = Slot(stage, kind, f"stage {stage}", start, forward if kind == "forward" else backward, m)
                items.append(item)
                free[stage] = ends[kind, stage, m] = item.end
                at[stage] += 1
    return items


def _needs(kind: str, stage: int, m: int, S: int) -> tuple[str, int, int] | None:
    if kind == "forward":
        return None if stage == 0 else (kind, stage - 1, m)
    return ("forward", stage, m) if stage == S - 1 else (kind, stage + 1, m)


def _chimera(S: int, M: int, forward: float, backward: float) -> list[Slot]:
    """Half of the micro-batches go down, half up; stage ``s`` of the way up is on rank ``S - 1 - s``. A rank takes the
    backward that is ready, else the forward that came first."""
    ends: dict[tuple[str, int, int], float] = {}
    free, items = [0.0] * S, list[Slot]()
    rest = {(kind, stage, m) for kind in ("forward", "backward") for stage in range(S) for m in range(M)}
    rank_of = lambda stage, m: stage if m % 2 == 0 else S - 1 - stage  # even ones go down
    while rest:
        ready = []
        for kind, stage, m in rest:
            needs = _needs(kind, stage, m, S)
            if needs is None or needs in ends:
                rank = rank_of(stage, m)
                begins = max(free[rank], 0.0 if needs is None else ends[needs])
                ready.append((begins, kind == "forward", m // 2, -stage, m, kind, stage, rank))
        begins, *_, m, kind, stage, rank = min(ready)
        item = Slot(rank, kind, f"stage {stage}", begins, forward if kind == "forward" else backward, m)
        items.append(item)
        free[rank] = ends[kind, stage, m] = item.end
        rest.remove((kind, stage, m))
    return items


@dataclass(frozen=True)
class _Untimed:
    """One item of the refresh before it has a time. ``after`` are others that have to be over; ``event`` the forward or
    backward."""

    kind: str
    of: str
    duration: float
    after: tuple[int, ...] = ()
    event: tuple[str, int] | None = None
    stage: int = 0


def fill(
    pipeline: Pipeline, forward: float, backward: float, layers: Mapping[int, Sequence[LayerWork]], most: int = 64
) -> FilledPipeline:
    """The refresh of ``layers``, by stage, in the gaps of a step and of those behind it, greedily.

    In each gap of a rank goes, as long as one fits with 5 % to spare, the first piece in this order whose predecessors are
    over: statistics of ``R`` (behind the forward of their micro-batch), of ``L`` (behind its backward), sums over ranks
    (behind all statistics of a factor), inversions (behind the sum). In further steps statistics are taken of the first
    one's micro-batches, which are over. What fits into no gap of a whole step is appended behind it.
    """
    base = pipeline_step(pipeline, forward, backward)
    length = max((item.end for item in base), default=0.0)
    lanes = [sorted((i for i in base if i.rank == rank), key=lambda i: i.start) for rank in range(pipeline.stages)]
    waiting = [_pieces(pipeline, rank, layers) for rank in range(pipeline.stages)]
    ends: list[dict[int, float]] = [{} for _ in lanes]
    items, step, appended = list[Slot](), 0, 0
    done = {(rank, i.kind, i.of, i.micro_batch): i.end for rank, lane in enumerate(lanes) for i in lane}
    while step < most and (step == 0 or any(len(own) > len(over) for own, over in zip(waiting, ends))):
        offset, filled = step * length, list[Slot]()
        for rank, lane in enumerate(lanes):
            at = 0.0
            for start, stop in [*((i.start, i.end) for i in lane), (length, length)]:
                _fill_gap(rank, offset + at, offset + start, waiting[rank], ends[rank], done, filled)
                at = max(at, stop)
        if step and not filled:
            break
        items += [*(item._replace(start=item.start + offset) for item in base), *filled]
        step += 1
    for rank in range(pipeline.stages):
        appended += _append(rank, step * length, waiting[rank], ends[rank], items)
    return FilledPipeline(pipeline, length, step, tuple(items), appended)


def _pieces(pipeline: Pipeline, rank: int, layers: Mapping[int, Sequence[LayerWork]]) -> list[_Untimed]:
    """Those of a rank in the order of priority; what takes no time is left out."""
    stages = {rank: list(range(pipeline.micro_batches))}
    if pipeline.schedule == "chimera":  # a rank has two stages, each with half of the micro-batches; sums are over both
        stages = {rank: list(range(0, pipeline.micro_batches, 2))}
        stages[pipeline.stages - 1 - rank] = list(range(1, pipeline.micro_batches, 2))
    found: list[_Untimed] = []
    curvature: dict[tuple[int, str, int], tuple[int, ...]] = {}
    for side, event in ((0, "forward"), (1, "backward")):
        for stage, batches in stages.items():
            for layer in layers.get(stage, ()):
                own = []
                for m in batches if layer.curvature[side] else ():
                    own.append(len(found))
                    kind = f"curvature {'RL'[side]}"
                    found.append(_Untimed(kind, layer.name, layer.curvature[side], (), (event, m), stage))
                curvature[stage, layer.name, side] = tuple(own)
    for kind, take in (("sync", lambda layer: layer.sync), ("inverse", lambda layer: layer.inverse)):
        for side in range(2):
            for stage in stages:
                for layer in layers.get(stage, ()):
                    if take(layer)[side]:
                        needs = curvature[stage, layer.name, side]
                        curvature[stage, layer.name, side] = (len(found),)
                        found.append(_Untimed(f"{kind} {'RL'[side]}", layer.name, take(layer)[side], needs, None, stage))
    return found


def _fill_gap(
    rank: int,
    start: float,
    stop: float,
    pieces: Sequence[_Untimed],
    ends: dict[int, float],
    done: Mapping[tuple, float],
    items: list[Slot],
) -> None:
    """As many pieces as fit between ``start`` and ``stop``."""
    while True:
        for at, piece in enumerate(pieces):
            if at in ends or piece.duration * SLACK > stop - start:
                continue
            if piece.event is not None and done[rank, piece.event[0], f"stage {piece.stage}", piece.event[1]] > start:
                continue
            if all(ends.get(other, stop) <= start for other in piece.after):
                items.append(Slot(rank, piece.kind, piece.of, start, piece.duration, piece.event and piece.event[1]))
                start = ends[at] = items[-1].end
                break
        else:
            return


def _append(rank: int, start: float, pieces: Sequence[_Untimed], ends: dict[int, float], items: list[Slot]) -> int:
    """The rest, one behind the other; pieces stand behind those that they need."""
    count = 0
    for at, piece in enumerate(pieces):
        if at not in ends:
            items.append(Slot(rank, piece.kind, piece.of, start, piece.duration, piece.event and piece.event[1]))
            start = ends[at] = items[-1].end
            count += 1
    return count
