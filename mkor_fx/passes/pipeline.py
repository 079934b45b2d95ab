"""The pipeline: the literal order of what happens to a captured graph, and which part of it each program has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from ..ir import StepGraph
from ..rules import Rules
from ..show.recorder import Recording
from .core import GraphPass, run_passes
from .lower.expand import expand
from .lower.order_products import order_products
from .lower.outline import EqualUpdates
from .lower.rank_k_updates import RankKUpdates
from .lower.share import share
from .lower.shortcut_row_sums import shortcut_row_sums
from .lower.skinny_products import skinny_products
from .lower.store_scalars import store_scalars
from .lower.unpack import unpack
from .lower.widen_products import widen_products
from .match.assign_rules import assign_rules
from .match.cancel_double_transpose import cancel_double_transpose
from .match.drop_detach import drop_detach
from .match.find_sites import find_sites
from .match.spell_transposes import spell_transposes
from .order.bucket import bucket
from .order.collectives import Group, in_line
from .order.issue_alike import issue_alike
from .order.pin import Overlap
from .order.recompute_checkpoints import recompute_checkpoints
from .order.schedule import schedule
from .order.update_when_ready import update_when_ready
from .torch_api.backend import PostGradPass
from .write.accumulate import accumulate
from .write.add_parts import add_parts
from .write.arrive import arrive
from .write.average_weights import average_weights
from .write.carry import carry
from .write.clip_divergence import clip_divergence
from .write.clip_gradients import clip_gradients
from .write.draft import Draft
from .write.optimize import optimize
from .write.precondition import precondition
from .write.precondition_in_backward import precondition_in_backward
from .write.receive import receive
from .write.reduce import reduce
from .write.refresh import refresh
from .write.resize import resize
from .write.return_state import return_state
from .write.scale_steps import scale_steps
from .write.seed import seed
from .write.send import send
from .write.spread_directions import spread_directions
from .write.statistics import statistics
from .write.step_draft import StepDraft
from .write.take_directions import take_directions
from .write.update_draft import UpdateDraft
from .write.write_back import write_back

log = logging.getLogger("mkor_fx")

CANONICALIZE = [spell_transposes, drop_detach, cancel_double_transpose]
#: of a whole step; ``VARIANTS`` says which of them a program has
REWRITE = [
    *(seed, statistics, accumulate, add_parts, reduce, clip_gradients, send, arrive, refresh),
    *(precondition, clip_divergence, spread_directions, optimize, scale_steps, average_weights, write_back),
]
#: of the drop-in door: its graphs in both modes, and the programs that run at the optimizer's step and behind the backward
CARRY = [statistics, carry]
CARRY_DIRECTIONS = [statistics, precondition_in_backward, carry]
UPDATE = [receive, refresh, precondition, clip_divergence, spread_directions, write_back]
APPLY = [take_directions, optimize, write_back]
REFRESH = [receive, refresh, resize, return_state]
COLLECTIVES = [bucket, issue_alike]
SCHEDULE = [recompute_checkpoints, update_when_ready]
LOWER = [order_products, shortcut_row_sums, expand, unpack, widen_products, skinny_products, share, store_scalars]


@dataclass(frozen=True)
class Variant:
    """A program of the whole step: its name, the passes that write it, and the weights whose state it refreshes, by name;
    None: of all that it uses."""

    name: str
    passes: tuple[str, ...]
    due: frozenset[str] | None = None

    def has(self, name: str) -> bool:
        return name in self.passes


#: from this rank's gradients to those of the whole batch; from there to new weights by a rule
WHOLE = ("add_parts", "reduce", "clip_gradients")
#: the optimizer's step
STEP = ("optimize", "average_weights", "write_back")
DIRECT = ("precondition", "clip_divergence", "spread_directions", *STEP)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("refresh", ("seed", "statistics", *WHOLE, "refresh", *DIRECT)),
        Variant("reuse", ("seed", *WHOLE, *DIRECT)),
        # no rule
        Variant("plain", ("seed", *WHOLE, *STEP)),
        # a part of a batch, whose last one is any of the others
        Variant("part", ("seed", "statistics", "accumulate", "write_back")),
        Variant("part without statistics", ("seed", "accumulate", "write_back")),
        # a rule that is not used for now: the base optimizer alone
        Variant("fallback", ("seed", *WHOLE, "optimize", "scale_steps", "average_weights", "write_back")),
        # statistics one step late: they leave and the last ones arrive, they only leave, they only arrive
        Variant("late refresh", ("seed", "statistics", *WHOLE, "send", "arrive", "refresh", *DIRECT)),
        Variant("collect", ("seed", "statistics", *WHOLE, "send", *DIRECT)),
        Variant("catch up", ("seed", *WHOLE, "arrive", "refresh", *DIRECT)),
    )
}


def choose(
    step: int, refresh_every: int, *, rule: bool = True, fallback: bool = False, stale: int = 0,
    turn: tuple[int, Collection[str]] | None = None,
) -> Variant:  # fmt: skip
    """The program of a step: statistics are taken every ``refresh_every`` steps, and used ``stale`` steps later. Where
    weights take turns: the phase whose ``turn`` it is, and its weights."""
    if not rule or fallback:
        return VARIANTS["fallback" if rule else "plain"]
    if turn is not None:
        return refresh_of(turn[1], f"phase {turn[0]}") if turn[1] else VARIANTS["reuse"]
    taken, used = step % refresh_every == 0, (step - stale) % refresh_every == 0
    if not stale:
        return VARIANTS["refresh" if used else "reuse"]
    return VARIANTS[{(True, True): "late refresh", (True, False): "collect", (False, True): "catch up"}.get(
        (taken, used), "reuse")]  # fmt: skip


def part_of(variant: Variant) -> Variant:
    """The program of the parts of a batch whose last one is ``variant``'s."""
    part = VARIANTS["part" if variant.has("statistics") else "part without statistics"]
    return part if variant.due is None else Variant(f"{part.name}: {variant.name}", part.passes, variant.due)


def refresh_of(due: Collection[str], name: str = "") -> Variant:
    """The program of a step that reuses all state but that of ``due``: weights whose turn it is, or that had no part in
    an earlier step of the window. ``name`` it where they are many."""
    return Variant(f"refresh of {name or ', '.join(sorted(due))}", VARIANTS["refresh"].passes, frozenset(due))


def check_left_out(names: Collection[str]) -> None:
    """Raises ValueError for the name of no pass that can be left out. What gives a program its results cannot."""
    known = [p.name for stage in (REWRITE, CARRY_DIRECTIONS, UPDATE, APPLY, REFRESH, COLLECTIVES, SCHEDULE) for p in stage]
    known.remove(return_state.name)
    known += [schedule.name, "stack", "pin", "outline", "rank_k_updates", *(p.name for p in LOWER if p is not expand)]
    for name in names:
        if name not in known:
            raise ValueError(f"without={name!r}: no such pass; there are {', '.join(dict.fromkeys(known))}")


def analyse(step: StepGraph, rules: Rules, graphs: Recording | None) -> None:
    """capture -> canonicalize -> match: every trainable parameter gets its role. ``graphs=None`` keeps and logs nothing."""
    run_passes(step, [], "capture", graphs)
    run_passes(step, CANONICALIZE, "canonicalize", graphs)
    run_passes(step, [find_sites, partial(assign_rules, rules=rules)], "match", graphs)
    if graphs is None:
        return
    graphs.describe(step)
    for index, parameter in step.parameters.items():
        log.debug("%s %s: %s", parameter.name, parameter.shape, step.declines.get(index, step.role(index).value))


def synthesise(
    draft: Draft,
    rewrite: Sequence[GraphPass],
    graphs: Recording,
    *,
    inductor: bool = False,
    partitioned: bool = False,
    group: Group | None = None,
    without: Collection[str] = (),
) -> None:
    """rewrite -> schedule -> lower: the passes of ``rewrite`` write the program, aten comes out.

    ``inductor``: expand what Inductor wants decomposed, too. ``partitioned``: torch will split the graph into forward and
    backward and honour checkpoints itself. ``group``: merge and order the collectives that were written. ``without`` names
    passes that are left out.
    """

    def kept(passes: Sequence[GraphPass], **options: Any) -> list[Callable[..., None]]:
        return [partial(p, **options) if options else p for p in passes if p.name not in without]

    run_passes(draft.step, kept(rewrite), "rewrite", graphs, draft)
    ordering = kept(SCHEDULE[1:] if partitioned else SCHEDULE)
    if group is not None:
        ordering = [*kept([bucket], group=group), *kept([issue_alike]), *ordering, *kept([schedule])]
    run_passes(draft.step, ordering, "schedule", graphs)
    stacked = group is None and _on_a_gpu(draft.step.graph) and "stack" not in without
    lowering = [
        *kept([order_products, shortcut_row_sums]),
        partial(expand, inductor=inductor, stacked=stacked),
        *kept([unpack, *([widen_products, skinny_products] if inductor else []), share]),
    ]
    run_passes(draft.step, lowering if partitioned else [*lowering, *kept([store_scalars])], "lower", graphs)


def _on_a_gpu(graph: fx.Graph) -> bool:
    values = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    return any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in values)


def closing(draft: StepDraft | UpdateDraft, group: Group | None, without: Collection[str]) -> list[PostGradPass]:
    """The passes that run behind all of Inductor's own over the graph of a draft that is written."""
    divided, owners = bool(in_line(draft.graph)), draft.owners()
    pinned: list[PostGradPass] = [] if group is None or "pin" in without else [Overlap(divided)]
    outlined: list[PostGradPass] = [] if "outline" in without else [EqualUpdates(owners)]
    return [*pinned, *outlined, *([] if "rank_k_updates" in without else [RankKUpdates()])]
