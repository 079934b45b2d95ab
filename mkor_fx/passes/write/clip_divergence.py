"""Directions of all weights together, no longer than a bound on what they would change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...prims import accumulation_dtype
from ...rules.hyper import Hyper, bind
from ..core import graph_pass
from .draft import Draft
from .vectors import Scales


@graph_pass(stage="rewrite")
def clip_divergence(draft: Draft) -> None:
    """For each rule with a ``kl_clip``: ``D <- nu D`` with ``nu = min(1, sqrt(kl_clip / |sum lr^2 <D, G>|))``, the sum
    over all of its weights and their biases (Martens and Grosse, 2015; KAISA)."""
    for rule in draft.rules:
        if rule.kl_clip is None:
            continue
        products: dict[Any, fx.Node] = {}
        for item in draft.items.values():
            if item.layout.rule in {rule}:  # by hash: tensors are not read
                for key, grad in ((item.key, item.grad), (item.bias_key, item.bias)):
                    if grad is not None and key in draft.directions:
                        given = (draft.directions[key], grad, *draft.rate(key)[:2], draft.scales)
                        products[key] = draft.insert(lowered, *given, label="kl clip")
        parts = draft.over_owners(products, "products", label="kl clip")
        if products:
            bound = bind(rule, draft.numbers(rule)).kl_clip
            share = draft.insert(share_within, parts, bound, label="kl clip")
            for key in products:
                draft.directions[key] = draft.insert(shorten, draft.directions[key], share, label="kl clip")


def lowered(direction: Tensor, grad: Tensor, numbers: Tensor, rate_at: int, scales: Scales | None) -> Tensor:
    """``lr^2 <D, G>``, 0-dim. ``numbers`` are the optimizer's."""
    wide = accumulation_dtype(grad.dtype)
    unscaled = 1.0 if scales is None else scales.gradient.to(wide).square().reciprocal()
    return (direction.to(wide) * grad.to(wide)).sum() * numbers[rate_at].to(wide).square() * unscaled


def share_within(products: list[Tensor], bound: Hyper) -> Tensor:
    """``nu``, 0-dim; 1 where the sum is zero or not finite."""
    share = (bound / torch.stack(products).sum().abs()).sqrt()
    return torch.where(torch.isfinite(share), share, torch.ones_like(share)).clamp(max=1)


def shorten(direction: Tensor, share: Tensor) -> Tensor:
    return direction * share.to(direction.dtype)
