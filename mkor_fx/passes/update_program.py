"""The programs that the drop-in door runs outside of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..rules import Rule
from ..runtime.given import Given
from ..show.recorder import Recording
from .core import GraphPass
from .order.collectives import Group
from .pipeline import closing, synthesise
from .torch_api.backend import Compiler, compile_graph, plain_tracing
from .write.update_draft import Job, UpdateDraft


def build_program(
    jobs: Sequence[Job],
    rules: Sequence[Rule],
    given: Given,
    rewrite: Sequence[GraphPass],
    compiler: Compiler,
    graphs: Recording,
    group: Group | None = None,
    without: Sequence[str] = (),
) -> Callable[[Given], list[Tensor]]:
    """One program of the passes ``rewrite`` over all of ``jobs``, called with tensors like those of ``given``.

    It writes new state, and weights whose direction is the step itself, in place; it returns the directions that the
    optimizer is to see, each weight's and its bias's, or what the last pass returns.
    """
    with plain_tracing():
        draft = UpdateDraft(jobs, rules, given, group)
        synthesise(draft, rewrite, graphs, group=group, without=without, inductor=compiler.backend == "inductor")
        passes = closing(draft, group, without)
        compiled = compile_graph(draft.step.module, compiler, graphs.code, *passes)

    def run(given: Given) -> list[Tensor]:
        with plain_tracing():
            return compiled(*given.tensors())

    return run
