"""Statistics vectors: what the uses of a weight come to, flat, and back to what a rule reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...ir import Operand, Site
from ...rules import Use
from ...rules.hyper import bind
from ...rules.results import check_summary
from ..match.layout import Layout
from ..match.uses import together
from ..torch_api.tracing import insert

#: how an operand is read in traced code: a view, the operand's value and further arguments
Reading = tuple[Any, ...]
#: present values of a rule's fields that change over time
Numbers = Mapping[str, Any]


class Scales(NamedTuple):
    """What a loss scaler has left in the statistics and in the gradient, 0-dim each; not finite: touch nothing."""

    statistics: Tensor
    gradient: Tensor


def of_share(share: Tensor | float, like: Tensor) -> Scales:
    """Of statistics of rows whose loss counts for a ``share`` of the whole; gradients are whole."""
    one = torch.ones((), dtype=torch.float32, device=like.device)
    return Scales(one * share, one)


def write_vectors(
    graph: fx.Graph,
    site: Site,
    numbers: Numbers,
    state: Mapping[str, fx.Node],
    key: fx.Node | None,
    dtype: torch.dtype,
) -> dict[int, fx.Node]:
    """Insert the statistics vector of each orientation in which the site's weight is used. ``key`` is what random signs are
    drawn by, for a rule that draws any."""
    vectors: dict[int, fx.Node] = {}
    layout, label = Layout.of(site), f"{site.parameter.name}: statistics"
    also: dict[str, Any] = {"state": dict(state)} if layout.rule.reads_state else {}
    also |= {"key": key} if layout.rule.draws else {}
    for taps in together(site.taps):
        a, g = ([_reading(operand) for operand in operands] for operands in zip(*((tap.a, tap.g) for tap in taps)))
        count = None if taps[0].count is None else _reading(taps[0].count)
        kind = taps[0].inputs
        assert kind is not None
        args = (layout, dict(numbers), kind, a, g, count, also, dtype)
        vector = insert(graph, summarize_uses, *args, label=label, pure=True)
        known = vectors.get(kind)
        vectors[kind] = vector if known is None else insert(graph, torch.add, known, vector, label=label)
    return vectors


def _reading(operand: Operand) -> Reading:
    return (operand.view, operand.node, *operand.arguments)


# ---- what is traced into the graphs -----------------------------------------------------------------------------------


def summarize_uses(
    layout: Layout,
    numbers: Numbers,
    kind: int,
    a: list[Reading],
    g: list[Reading],
    count: Reading | None,
    also: dict[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """The statistics vector of uses whose rows are put one behind the other, ``[S]``: of each member the flat summary,
    then the number of rows. ``also`` is what ``summarize`` reads beside them."""
    a_NI, g_NO = (_behind_each_other([view(*arguments) for view, *arguments in readings]) for readings in (a, g))
    if count is None:
        rows = torch.ones_like(g_NO[..., 0], dtype=dtype).sum(-1)
    else:
        rows = count[0](*count[1:]).to(dtype).expand(g_NO.shape[:-2])
    rule: Any = bind(layout.rule, numbers)
    shapes = layout.summary_shapes(kind)

    shared = {"key": also["key"]} if "key" in also else {}

    def summarize(a_NI: Tensor, g_NO: Tensor, *state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        read: dict[str, Any] = {"state": state[0], **shared} if state else shared
        made = rule.summarize(layout.shape_of_use(kind), a_NI, g_NO, **read)
        check_summary(rule, made, shapes)
        return made

    summary = layout.each(summarize)(a_NI, g_NO, *([also["state"]] if "state" in also else []))
    flat = [s.reshape([*rows.shape, -1]).to(dtype) for s in summary]
    return torch.cat([*flat, rows.unsqueeze(-1)], -1).flatten()


def _behind_each_other(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, -2)


def split_vectors(layout: Layout, vectors: Mapping[int, Tensor]) -> dict[int, list[Tensor]]:
    """Statistics vectors as each orientation's summary with the number of rows behind it, ``[E, ...]`` if batched."""
    split = {}
    for kind, vector in vectors.items():
        shapes = layout.summary_shapes(kind)
        sizes = [s.numel() for s in shapes]
        lead = () if layout.members is None else (layout.members,)
        used = vector[: (layout.members or 1) * (sum(sizes) + 1)].reshape([*lead, -1])
        *parts, rows = used.split([*sizes, 1], -1)
        split[kind] = [*(p.reshape([*lead, *shape]) for p, shape in zip(parts, shapes)), rows.squeeze(-1)]
    return split


def uses_of(layout: Layout, summaries: Mapping[int, list[Tensor]], scales: Scales | None = None) -> list[Use]:
    """What ``update`` reads of one matrix."""
    uses = []
    for kind, (*parts, rows) in summaries.items():
        summary = tuple(parts) if scales is None else layout.rule.unscale(tuple(parts), scales.statistics)
        uses.append(Use(summary, rows, opposite=kind != layout.kinds[0]))
    return uses
