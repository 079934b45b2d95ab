"""Whether a step counts: code that is written into its graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ...prims import accumulation_dtype


def norm(grad: Tensor) -> Tensor:
    real = torch.view_as_real(grad) if grad.is_complex() else grad
    return torch.linalg.vector_norm(real, dtype=accumulation_dtype(grad.dtype))


def absolute(loss: Tensor) -> Tensor:
    return loss.detach().abs()


def of_part(loss: Tensor, share: Tensor) -> Tensor:
    return loss.detach().to(share.dtype) * share


def weighted(loss: Tensor, share: Tensor | float) -> Tensor:
    return loss.detach() * share


def total(parts: list[Tensor], loss: Tensor, dtype: torch.dtype) -> Tensor:
    return sum(parts, torch.zeros((), dtype=dtype, device=loss.device))


def all_finite(norms: list[Tensor]) -> Tensor:
    """Whether the loss and every gradient are finite, 0-dim: the sum of their norms is, short of overflow."""
    return torch.isfinite(sum(norms[1:], norms[0]))


def is_taken(loss: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=loss.device)


def count_skip(skipped: Tensor, keep: Tensor) -> Tensor:
    return skipped + (~keep).to(skipped.dtype)
