"""The pipeline: the literal order of what happens to a captured graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from ..graphs import Graphs
from ..ir import StepGraph
from ..rules import Rule
from .bucket import bucket
from .canonicalize import cancel_double_transpose, drop_detach, spell_transposes
from .collectives import Group
from .core import run_passes
from .lower import expand, shortcut_row_sums, store_scalars
from .match import find_sites
from .overlap import schedule
from .owners import issue_alike
from .rewrite import decline_by_rule
from .schedule import recompute_checkpoints, update_when_ready

log = logging.getLogger("mkor_fx")

CANONICALIZE = [spell_transposes, drop_detach, cancel_double_transpose]
SCHEDULE = [recompute_checkpoints, update_when_ready]


def analyse(step: StepGraph, rule: Rule | None, graphs: Graphs | None) -> None:
    """capture -> canonicalize -> match: every trainable parameter gets its role. ``graphs=None`` keeps and logs nothing."""
    run_passes(step, [], "capture", graphs)
    run_passes(step, CANONICALIZE, "canonicalize", graphs)
    matching = [find_sites] if rule is None else [find_sites, partial(decline_by_rule, rule=rule)]
    run_passes(step, matching, "match", graphs)
    if graphs is None:
        return
    graphs.describe(step)
    for index, parameter in step.parameters.items():
        log.debug("%s %s: %s", parameter.name, parameter.shape, step.declines.get(index, step.role(index).value))


def synthesise(
    step: StepGraph,
    rewrite: Callable[[Any], None],
    graphs: Graphs,
    *,
    inductor: bool,
    partitioned: bool = False,
    group: Group | None = None,
) -> None:
    """rewrite -> schedule -> lower: ``rewrite`` writes statistics and updates, aten comes out.

    ``inductor``: expand what Inductor wants decomposed, too. ``partitioned``: torch will split the graph into forward and
    backward and honour checkpoints itself. ``group``: merge and order the collectives that ``rewrite`` has written.
    """
    run_passes(step, [rewrite], "rewrite", graphs)
    ordering = [update_when_ready] if partitioned else SCHEDULE
    if group is not None:
        ordering = [partial(bucket, sizes=group.buckets), issue_alike, *ordering, schedule]
    run_passes(step, ordering, "schedule", graphs)
    lowering = [shortcut_row_sums, partial(expand, inductor=inductor)]
    run_passes(step, lowering if partitioned else [*lowering, store_scalars], "lower", graphs)
