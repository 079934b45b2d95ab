"""State from statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...rules import Gradient, Rule, Use
from ...rules.hyper import bind
from ...rules.results import check_state
from ..core import graph_pass
from ..match.layout import Layout
from .draft import Draft
from .vectors import Numbers, Scales, split_vectors, uses_of


@graph_pass(stage="rewrite")
def refresh(draft: Draft) -> None:
    """Each weight's state as its rule's ``update`` makes it of the statistics, where there are any."""
    for item in draft.items.values():
        if not item.vectors or not item.state:
            continue
        new = draft.insert(
            refresh_one,
            item.layout,
            draft.numbers(item.layout.rule),
            item.vectors,
            item.grad,
            item.bias,
            item.state,
            draft.clock(item.label),
            draft.scales_of_statistics(),
            label=item.label,
        )
        draft.refreshed(item, new)


# ---- what is traced into the graphs -----------------------------------------------------------------------------------


def refresh_one(
    layout: Layout,
    numbers: Numbers,
    vectors: Mapping[int, Tensor],
    grad: Tensor | None,
    bias_grad: Tensor | None,
    state: dict[str, Tensor],
    step: Tensor,
    scales: Scales | None = None,
) -> dict[str, Tensor]:
    """New state of one weight; as it was where a statistic is not finite.

    ``vectors`` are the statistics by orientation. ``grad`` is None where there is no gradient to read.
    """
    rule = bind(layout.rule, numbers)
    gradient = _gradient(layout, grad, bias_grad, next(iter(vectors.values())))
    if scales is not None:
        gradient = Gradient(*(None if g is None else g / scales.gradient.to(g.dtype) for g in gradient))
    finite = all_finite(list(vectors.values()) + (list(gradient.tensors().values()) if rule.reads_gradient else []))
    if scales is not None:
        finite = finite & torch.isfinite(scales.statistics) & torch.isfinite(scales.gradient)

    def member(
        state: dict[str, Tensor], gradient: dict[str, Tensor], summaries: Mapping[int, list[Tensor]]
    ) -> dict[str, Tensor]:
        return refreshed(rule, state, uses_of(layout, summaries, scales), Gradient(**gradient), step, finite)

    return layout.each(member)(state, gradient.tensors(), split_vectors(layout, vectors))


def _gradient(layout: Layout, grad: Tensor | None, bias: Tensor | None, like: Tensor) -> Gradient:
    if grad is not None:
        return layout.orient(grad, bias)
    lead, shape = () if layout.members is None else (layout.members,), layout.shape
    return Gradient(
        like.new_zeros(*lead, shape.O, shape.I), like.new_zeros(*lead, shape.O) if layout.bias else None
    )


def refreshed(
    rule: Rule, state: dict[str, Tensor], uses: list[Use], grad: Gradient, step: Tensor, finite: Tensor
) -> dict[str, Tensor]:
    """New state of one matrix; as it was where a statistic is not finite, or no row was seen."""
    updated = rule.update(state, uses, grad, step)
    check_state(rule, "update", updated, state)
    keep = finite & (sum((use.rows for use in uses[1:]), uses[0].rows) > 0)
    return select(keep, updated, state)


def select(keep: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``new`` where ``keep`` (0-dim), else ``old``, entry by entry and in its dtype; what is the same tensor stays it."""
    return {name: t if new[name] is t else torch.where(keep, new[name].to(t.dtype), t) for name, t in old.items()}


def all_finite(tensors: list[Tensor], like: Tensor | None = None) -> Tensor:
    """Whether every element is finite, 0-dim; where there may be no tensor, on the device of ``like``."""
    if like is not None and not tensors:
        return torch.ones((), dtype=torch.bool, device=like.device)
    finite = torch.isfinite(tensors[0]).all()
    for tensor in tensors[1:]:
        finite = finite & torch.isfinite(tensor).all()
    return finite
