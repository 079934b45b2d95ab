"""What a pass is, and the runner that times, verifies and records each one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..graphs import Graphs
from ..ir import StepGraph, verify


@dataclass(frozen=True)
class GraphPass:
    """A function of the graph with options bound where the pipeline is built; ``exact`` promises bitwise equality."""

    run: Callable[..., None]
    stage: str
    exact: bool

    @property
    def name(self) -> str:
        return self.run.__name__

    def __call__(self, step: StepGraph, **options: object) -> None:
        self.run(step, **options)


def graph_pass(*, stage: str, exact: bool = False) -> Callable[[Callable[..., None]], GraphPass]:
    """Declare a pass: the stage it belongs to, and whether the graph computes bit for bit the same after it."""
    return lambda run: GraphPass(run, stage, exact)


def run_passes(step: StepGraph, pipeline: list[Callable[[StepGraph], None]], stage: str, graphs: Graphs) -> None:
    """Run a stage's passes in order, hold the result to the stage's grammar and keep a copy of it."""
    start = time.perf_counter()
    for graph_pass_ in pipeline:
        graph_pass_(step)
    step.module.recompile()
    verify(step, stage)
    graphs.record(stage, step.module, time.perf_counter() - start)
