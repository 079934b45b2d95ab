"""A simulated step: a table, a Chrome trace, a page."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..passes.order.estimate import EFFICIENCY, Device
from .bubbles import FilledPipeline
from .costs import aligned, short
from .page import write_page

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass
class Event:
    """What one lane does for a while. Times in milliseconds, all estimated.

    ``op`` of a fused run lists its operators; ``label`` is the parameter, module or bucket. ``phase`` is what its time
    counts under. ``bytes``: read and written in the device's memory, or sent. ``issued``: when the program starts the
    collective, which begins when the network is free; ``messages`` are the tensors in it. ``exposed``: of a collective,
    how long computing stands still for it.
    """

    lane: str
    op: str
    label: str
    phase: str
    start: float
    duration: float
    bytes: int
    issued: float | None = None
    messages: tuple[str, ...] = ()
    exposed: float = 0.0

    @property
    def end(self) -> float:
        return self.start + self.duration


class Inversion(NamedTuple):
    """What is derived of one weight's state outside of the step's program: ``rows`` of the matrices that are inverted or
    decomposed, every so many steps, on one ``rank``, which sends the results, or on all (None). Estimated milliseconds of
    both."""

    name: str
    rows: tuple[int, ...]
    every: int
    rank: int | None
    derive_ms: float
    send_ms: float


@dataclass(frozen=True)
class Simulation:
    """One step's estimated schedule: ``events`` in the order of the program, on a compute and a communication lane;
    ``inversions`` are what runs behind some of the steps; ``filled`` is the step cut into the stages of a pipeline, where
    one was given.

    No number in it was measured. ``print`` gives a table.
    """

    title: str
    world_size: int
    device: Device
    events: tuple[Event, ...]
    inversions: tuple[Inversion, ...] = ()
    filled: FilledPipeline | None = None

    @property
    def note(self) -> str:
        return (
            f"Estimates, not measurements: a roofline over data-sheet peaks ({EFFICIENCY:.0%} of flops) and Inductor's "
            f"model of NCCL, {min(self.world_size, 8)} GPUs a node. Launch cost, late ranks and contention are left out."
        )

    def lane(self, name: str) -> list[Event]:
        """``"compute"`` or ``"communication"``: its events in order. A wait is an event of the compute lane."""
        return [event for event in self.events if event.lane == name]

    @cached_property
    def total_ms(self) -> float:
        """From the first node to the end of the last event on either lane."""
        return max((event.end for event in self.events), default=0.0)

    @cached_property
    def compute_ms(self) -> float:
        return sum(event.duration for event in self.lane(COMPUTE) if event.op != "wait")

    @cached_property
    def communication_ms(self) -> float:
        return sum(event.duration for event in self.lane(COMMUNICATION))

    @cached_property
    def exposed_ms(self) -> float:
        """Time in which the device computes nothing because a collective is under way."""
        return self.total_ms - self.compute_ms

    @cached_property
    def hidden(self) -> float:
        """Fraction of communication that computing covers; 1 where there is none."""
        return 1.0 - self.exposed_ms / self.communication_ms if self.communication_ms else 1.0

    def phases(self) -> dict[str, float]:
        """Estimated milliseconds of computing by phase: forward, backward, statistics, precondition, optimizer, ..."""
        found: dict[str, float] = {}
        for event in self.lane(COMPUTE):
            if event.op != "wait":
                found[event.phase] = found.get(event.phase, 0.0) + event.duration
        return found

    def inversion_ms(self) -> dict[int, float]:
        """Estimated milliseconds of deriving by rank, of all weights once; what every rank derives counts for each."""
        found = dict.fromkeys(range(self.world_size), 0.0)
        for one in self.inversions:
            for rank in found if one.rank is None else [one.rank]:
                found[rank] += one.derive_ms
        return found

    def table(self, everything: bool = False) -> str:
        """Summary, time by phase, and a line for each collective; with ``everything`` for each event."""
        phases = aligned(
            [[name, _ms(ms), f"{ms / self.total_ms:.1%}"] for name, ms in self.phases().items()],
            ["computing (estimated)", "ms", "of the step"],
            "lrr",
        )
        sent = aligned(
            [
                [e.op, e.label, short(e.bytes, "B"), _ms(e.issued), _ms(e.start), _ms(e.duration), _ms(e.end),
                 _ms(e.exposed)]
                for e in self.lane(COMMUNICATION)
            ],
            ["collective (estimated)", "carries", "bytes", "issued ms", "start ms", "duration ms", "end ms", "exposed ms"],
            "llrrrrrr",
        )  # fmt: skip
        parts = [self.summary(), phases, sent]
        if self.inversions:
            rows = [
                [one.name, ", ".join(map(str, one.rows)), f"every {one.every}",
                 "every rank" if one.rank is None else f"rank {one.rank}", _ms(one.derive_ms), _ms(one.send_ms)]
                for one in self.inversions
            ]  # fmt: skip
            headers = ["derived outside of the program (estimated)", "rows", "steps", "by", "derive ms", "send ms"]
            parts.append(aligned(rows, headers, "lrrlrr"))
        if self.filled is not None:
            parts.append(self.filled.table())
        if everything:
            rows = [[e.lane, e.op, e.label, short(e.bytes, "B"), _ms(e.start), _ms(e.duration)] for e in self.events]
            headers = ["lane", "op", "label", "bytes", "start ms", "duration ms"]
            parts.append(aligned(rows, headers, "lllrrr"))
        return "\n\n".join([*parts, self.note])

    def summary(self) -> str:
        return (
            f"{self.title} on {self.world_size} x {self.device.name}, estimated: {_ms(self.total_ms)} ms a step, "
            f"{_ms(self.compute_ms)} ms computing, {_ms(self.communication_ms)} ms communication, "
            f"{_ms(self.exposed_ms)} ms of it exposed ({self.hidden:.1%} hidden)"
        )

    def __str__(self) -> str:
        return self.table()

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write Chrome's trace format, which chrome://tracing and Perfetto open."""
        threads = {COMPUTE: 0, COMMUNICATION: 1}
        names = [
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": f"{lane} (estimated)"}}
            for lane, tid in threads.items()
        ]
        process = {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": self.summary()}}
        spans = [
            {"ph": "X", "pid": 0, "tid": threads[e.lane], "ts": e.start * 1e3, "dur": e.duration * 1e3, "cat": e.phase,
             "name": f"{e.op}: {e.label}" if e.label else e.op,
             "args": {"bytes": e.bytes, "estimated": True, "carries": list(e.messages)}}
            for e in self.events
        ]  # fmt: skip
        trace = {"traceEvents": [process, *names, *spans], "displayTimeUnit": "ms", "otherData": {"note": self.note}}
        Path(path).write_text(json.dumps(trace), encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs no network: both lanes to zoom into, and the table of collectives."""
        data = {
            "title": f"{self.title} on {self.world_size} × {self.device.name}",
            "note": self.note,
            "source": self.device.source,
            "total": self.total_ms,
            "compute": self.compute_ms,
            "communication": self.communication_ms,
            "exposed": self.exposed_ms,
            "hidden": self.hidden,
            "phases": self.phases(),
            "events": [asdict(event) for event in self.events],
        }
        write_page(path, "timeline.html", data)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
