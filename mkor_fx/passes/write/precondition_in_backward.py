"""Directions in the place of gradients, inside the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import Gradient
from ...rules.direction import direction_of
from ...rules.hyper import bind
from ..core import graph_pass
from ..match.layout import Layout
from .joint_draft import JointDraft
from .vectors import Numbers


@graph_pass(stage="rewrite")
def precondition_in_backward(draft: JointDraft) -> None:
    """Each gradient's direction, with state and sizes from before this step."""
    for index, item in draft.items.items():
        direction, bias, draft.norms[index] = draft.insert(
            direct_in_backward,
            item.layout,
            draft.numbers(item.layout.rule),
            item.grad,
            item.bias,
            item.state,
            item.scale,
            label=item.label,
        )
        draft.directions |= {index: direction} if bias is None else {index: direction, item.bias_key: bias}


# ---- what is traced into the graphs -----------------------------------------------------------------------------------


def direct_in_backward(
    layout: Layout,
    numbers: Numbers,
    grad: Tensor,
    bias_grad: Tensor | None,
    state: dict[str, Tensor],
    scale: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(direction, bias direction, norms)``; linear in the gradient, given ``state``, so micro-batches and ranks add up.

    ``scale`` brings weight and bias direction to the size of the last step, ``[2]`` each matrix. ``norms`` are ``|G|^2,
    |D|^2`` of weight and bias of each matrix, flat: they add up as well.
    """
    rule = bind(layout.rule, numbers)

    def member(
        state: dict[str, Tensor], gradients: dict[str, Tensor], scale: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        directions = direction_of(rule, state, Gradient(**gradients), None)[0].tensors()
        norms = [_square_sum(t.get(name), scale) for name in ("weight", "bias") for t in (gradients, directions)]
        if rule.graft is not None:
            directions = {k: d * s.to(d.dtype) for (k, d), s in zip(directions.items(), scale)}
        return directions, torch.stack(norms)

    directions, norms = layout.each(member)(state, layout.orient(grad, bias_grad).tensors(), scale)
    bias = None if bias_grad is None else directions["bias"].reshape(bias_grad.shape)
    return layout.store(directions["weight"], grad.shape), bias, norms.flatten()


def _square_sum(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()) if x is None else (x.to(like.dtype) * x.to(like.dtype)).sum()
