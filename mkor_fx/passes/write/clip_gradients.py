"""Gradients no longer, all together, than a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ...prims import accumulation_dtype
from ...runtime import inputs
from ..core import graph_pass
from .clip_divergence import shorten
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def clip_gradients(draft: StepDraft) -> None:
    """``G <- min(1, clip_norm / (|G| + 1e-6)) G`` with the norm over all gradients, as
    ``torch.nn.utils.clip_grad_norm_``."""
    bound, label = draft.plan.clip_norm, "clip norm"
    if bound is None:
        return
    squares = {i: draft.insert(square, grad, label=label) for i, grad in draft.gradients.items()}
    norm = draft.norm = draft.insert(root, draft.over_owners(squares, "squares", label=label), label=label)
    share = draft.insert(share_within, norm, bound, label=label)
    draft.gradients = {i: draft.insert(shorten, grad, share, label=label) for i, grad in draft.gradients.items()}
    told = draft.insert(torch.Tensor.to, norm, torch.float32, label=label)
    draft.settled[draft.scalar(inputs.GradientNorm(), torch.float32)] = told
    draft.hand_out()


def square(grad: Tensor) -> Tensor:
    real = torch.view_as_real(grad) if grad.is_complex() else grad
    return real.to(accumulation_dtype(grad.dtype)).square().sum()


def root(squares: list[Tensor]) -> Tensor:
    return torch.stack([s.to(squares[-1].dtype) for s in squares]).sum().sqrt()


def share_within(norm: Tensor, bound: float) -> Tensor:
    return (bound / (norm + 1e-6)).clamp(max=1.0)
