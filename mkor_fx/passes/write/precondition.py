"""Directions from gradients."""

from __future__ import annotations

from torch import Tensor

from ...rules import Gradient
from ...rules.direction import direction_of
from ...rules.hyper import bind
from ...rules.results import check_state
from ..core import graph_pass
from ..match.layout import Layout
from .draft import Draft
from .refresh import all_finite, select
from .sizing import Sizing
from .vectors import Numbers, Scales


@graph_pass(stage="rewrite")
def precondition(draft: Draft) -> None:
    """Each weight's state ``advance``d by its gradient, and the direction that it makes of it, ``normalize``d and in
    the size of its graft."""
    for item in draft.items.values():
        direction, bias, new = draft.insert(
            direct_one,
            item.layout,
            draft.numbers_of(item),
            item.sizing,
            (item.grad, item.bias),
            item.state,
            draft.clock(item.label),
            draft.longest(item),
            draft.scales,
            label=item.label,
        )
        draft.advanced(item, new)
        found = {item.key: direction} if bias is None else {item.key: direction, item.bias_key: bias}
        draft.directions |= found
        if item.sizing.final:
            draft.final |= found.keys()


# ---- what is traced into the graphs -----------------------------------------------------------------------------------


def direct_one(
    layout: Layout,
    numbers: Numbers,
    sizing: Sizing,
    gradients: tuple[Tensor, Tensor | None],
    state: dict[str, Tensor],
    step: Tensor,
    longest: Tensor | None = None,
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """``(direction, bias direction, new state)`` of one weight. A gradient that is not finite advances no state.

    A rule that only multiplies may be given a gradient that is still scaled; whatever keeps moments, makes its direction
    otherwise, or sizes it by itself, sees it unscaled, and the base optimizer gets it back in the scale that it expects.
    ``longest`` bounds steps that are as long as Adam's.
    """
    rule = bind(layout.rule, {**numbers, **dict(sizing.fields)})
    advances, is_step = rule.overrides("advance") or rule.overrides("normalize"), sizing.final
    grad, bias_grad = gradients
    gradient = layout.orient(grad, bias_grad)
    scale_matters = sizing.graft in ("rms", "adam") or rule.overrides("precondition") or rule.overrides("moment")
    unscaled = scales is not None and (advances or is_step or scale_matters)
    if scales is not None and unscaled:
        gradient = Gradient(*(None if g is None else g / scales.gradient.to(g.dtype) for g in gradient))
    finite = all_finite(list(gradient.tensors().values())) if advances else None

    def member(
        state: dict[str, Tensor], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        one = Gradient(**tensors)
        if finite is not None:
            advanced = rule.advance(state, one, step)
            check_state(rule, "advance", advanced, state)
            state = select(finite, advanced, state)
        direction, new = direction_of(rule, state, one, sizing.graft, longest)
        return direction.tensors(), state if finite is None else select(finite, new, state)

    directions, new = layout.each(member)(state, gradient.tensors())
    if scales is not None and unscaled and not is_step:
        directions = {name: d * scales.gradient.to(d.dtype) for name, d in directions.items()}
    bias = None if bias_grad is None else directions["bias"].reshape(bias_grad.shape)
    return layout.store(directions["weight"], grad.shape), bias, new if advances else state
