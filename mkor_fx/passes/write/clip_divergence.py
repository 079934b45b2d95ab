"""Directions of all weights together, no longer than a bound on what they would change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...prims import accumulation_dtype
from ...rules.hyper import Hyper, bind
from ..core import graph_pass
from .draft import Draft
from .vectors import Scales


@graph_pass(stage="rewrite")
def clip_divergence(draft: Draft) -> None:
    """For each rule with a ``kl_clip``: ``D <- nu D`` with ``nu = min(1, sqrt(kl_clip / |sum lr^2 <D, G>|))``, the sum over all of
    its weights and their biases (Martens and Grosse, 2015; KAISA)."""
    for rule in draft.rules:
        items = [item for item in draft.items.values() if item.layout.rule in {rule}]  # by hash: tensors are not read
        if rule.kl_clip is None or not items:
            continue
        pairs = [(item.key, item.grad) for item in items] + [(item.bias_key, item.bias) for item in items if item.bias is not None]
        keys, grads = zip(*((key, grad) for key, grad in pairs if key in draft.directions), strict=True)
        rates = [draft.rate(key) for key in keys]
        directions = [draft.directions[key] for key in keys]
        bound = bind(rule, draft.numbers(rule)).kl_clip
        places = [rate.rate_at for rate in rates]
        share = draft.insert(
            share_within, directions, list(grads), rates[0].numbers, places, bound, draft.scales, label="kl clip"
        )
        for key, direction in zip(keys, directions, strict=True):
            draft.directions[key] = draft.insert(shorten, direction, share, label="kl clip")


def share_within(
    directions: Sequence[Tensor], grads: Sequence[Tensor], numbers: Tensor, rates: Sequence[int], bound: Hyper,
    scales: Scales | None,
) -> Tensor:  # fmt: skip
    """``nu``, 0-dim; 1 where the sum is zero or not finite. ``numbers`` are the optimizer's, ``rates`` their places in it."""
    wide = accumulation_dtype(grads[0].dtype)
    unscaled = 1.0 if scales is None else scales.gradient.to(wide).square().reciprocal()
    products = [(d.to(wide) * g.to(wide)).sum() * numbers[at].to(wide).square() for d, g, at in zip(directions, grads, rates)]
    share = (bound / (torch.stack(products).sum() * unscaled).abs()).sqrt()
    return torch.where(torch.isfinite(share), share, torch.ones_like(share)).clamp(max=1)


def shorten(direction: Tensor, share: Tensor) -> Tensor:
    return direction * share.to(direction.dtype)
