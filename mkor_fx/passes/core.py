"""What a pass is, and the runner that times, verifies and records each one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..ir import StepGraph, verify
from ..show.dump import pass_name
from ..show.recorder import Recording
from .torch_api.capture import trace_artifact

log = logging.getLogger("mkor_fx")


class Finished(Protocol):
    """What the passes of one stage work on in place of the graph: they fill it in, and it finishes the graph."""

    def finish(self) -> None: ...


@dataclass(frozen=True)
class GraphPass:
    """A function of the graph, or of the draft of one, with options bound where the pipeline is built; ``exact`` promises
    bitwise equality."""

    run: Callable[..., None]
    stage: str
    exact: bool

    @property
    def name(self) -> str:
        return self.run.__name__

    def __call__(self, subject: StepGraph | Finished, **options: object) -> None:
        self.run(subject, **options)


def graph_pass(*, stage: str, exact: bool = False) -> Callable[[Callable[..., None]], GraphPass]:
    """Declare a pass: the stage it belongs to, and whether the graph computes bit for bit the same after it."""
    return lambda run: GraphPass(run, stage, exact)


def run_passes(
    step: StepGraph,
    pipeline: Sequence[Callable[..., None]],
    stage: str,
    graphs: Recording | None,
    draft: Finished | None = None,
) -> None:
    """Run a stage's passes in order, hold the result to the stage's grammar and keep a copy of it in ``graphs``.

    With a ``draft`` they are passes over it, and its graph is finished behind them. Each stage kept is also an artifact of
    torch's trace log, and with ``MKOR_FX_DUMP`` each pass a pair of files.
    """
    name = "" if graphs is None else f"{len(graphs.stages):02}_{stage}"

    def dump(what: str) -> None:
        if graphs is not None:
            graphs.dump.write(f"{name}.{what}", step.module)

    dump("before")
    seconds = 0.0
    for position, graph_pass_ in enumerate(pipeline):
        dump(f"{position}_{pass_name(graph_pass_)}.before")
        start = time.perf_counter()
        graph_pass_(step if draft is None else draft)
        seconds += time.perf_counter() - start
        dump(f"{position}_{pass_name(graph_pass_)}.after")
    start = time.perf_counter()
    if draft is not None:
        draft.finish()
    verify(step, stage)
    if graphs is None:
        return
    graphs.record(stage, step.module, seconds + time.perf_counter() - start)
    dump("after")
    log.info("%s: %s: %d nodes, %.0f ms", graphs.title, stage, graphs[stage].nodes, graphs[stage].seconds * 1e3)
    trace_artifact(f"mkor_fx_{name}", lambda: graphs[stage].print_readable(print_output=False))
