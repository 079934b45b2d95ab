"""How inverse factors take statistics: MKOR's semantic operators.

Shape suffixes: ``D`` one side of a factor, ``R`` statistics. A batch of factors lies in front. Where a number may change
over time, an operator has a twin ``..._by`` that takes 0-dim tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..prims import column_square_sum, for_each, prim, stored

#: a sum shorter than this many times its expected rounding counts as zero
NOISE = 32.0


def _inverse_update(
    factor_DD: Tensor, vectors: list[Tensor], scale: float | Tensor, shift: float | Tensor, weight: float | Tensor
) -> Tensor:
    """Sherman-Morrison steps on an inverse factor, in the dtype of the vectors.

    With ``B_0 = scale * F + shift * I`` returns ``B_k``, where ``B_j = B_{j-1} - weight u u^T / (1 + weight v_j^T u)``
    and ``u = B_{j-1} v_j``, that is ``inverse(inverse(B_0) + weight * sum_j v_j v_j^T)``, ``[D, D]``. All products with
    the matrix read ``F`` once; the later vectors are corrected by the earlier ones, so that the factor is read twice and
    written once whatever their number. A divisor that is not positive (a factor that rounding has made indefinite) skips
    its step.
    """
    factor = factor_DD.to(vectors[0].dtype)
    scale_1, shift_1, weight_1 = (for_each(x, 1, factor.dtype) for x in (scale, shift, weight))
    roots: list[Tensor] = []  # r_j with r r^T = weight u u^T / (1 + weight v^T u): a symmetric step stays symmetric
    for v_D in map(stored, vectors):
        u_D = scale_1 * (factor * v_D.unsqueeze(-2)).sum(-1) + shift_1 * v_D
        for root_D in roots:
            u_D = u_D - root_D * (root_D * v_D).sum(-1, keepdim=True)
        u_D = stored(u_D)
        divisor = 1 + weight_1 * (v_D * u_D).sum(-1, keepdim=True)
        roots.append(stored(u_D * torch.where(divisor > 0, weight_1 / divisor, torch.zeros_like(divisor)).sqrt()))
    index_D = stored(torch.arange(factor.shape[-1], dtype=factor.dtype, device=factor.device))
    identity = (index_D[:, None] == index_D).to(factor.dtype)
    updated = for_each(scale, 2, factor.dtype) * factor + for_each(shift, 2, factor.dtype) * identity
    for root_D in roots:
        updated = updated - root_D.unsqueeze(-1) * root_D.unsqueeze(-2)
    return updated.to(factor_DD.dtype)


@prim("inverse_update(Tensor factor, Tensor[] vectors, float scale, float shift, float weight) -> Tensor")
def inverse_update(factor_DD: Tensor, vectors: list[Tensor], scale: float, shift: float, weight: float) -> Tensor:
    return _inverse_update(factor_DD, vectors, scale, shift, weight)


@prim("inverse_update_by(Tensor factor, Tensor[] vectors, Tensor scale, Tensor shift, Tensor weight) -> Tensor")
def inverse_update_by(factor_DD: Tensor, vectors: list[Tensor], scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return _inverse_update(factor_DD, vectors, scale, shift, weight)


def _damped_update(factor_DD: Tensor, roots_KD: Tensor, gamma: float | Tensor) -> Tensor:
    """``F / gamma - X^T X``, ``[D, D]``, symmetric as it is written: rounding in an antisymmetric part would grow as
    ``gamma^-t``. The factor is read twice and written once, however many roots ``X`` of ``[K, D]`` there are."""
    updated = factor_DD.to(roots_KD.dtype) / for_each(gamma, 2, roots_KD.dtype) - roots_KD.mT @ roots_KD
    if factor_DD.dtype in (torch.bfloat16, torch.float16):  # rounding moves eigenvalues by less than this
        largest = updated.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).unsqueeze(-1)
        identity = torch.eye(updated.shape[-1], dtype=updated.dtype, device=updated.device)
        updated = updated + (torch.finfo(factor_DD.dtype).eps * largest) * identity
    return updated.to(factor_DD.dtype)


@prim("inverse_root(Tensor gram) -> Tensor", stacked=True)
def inverse_root(gram_KK: Tensor) -> Tensor:
    """``T^-1`` of ``I + G = T T^T``, by Cholesky; zero where rounding has left no root."""
    identity_KK = torch.eye(gram_KK.shape[-1], dtype=gram_KK.dtype, device=gram_KK.device)
    root, info = torch.linalg.cholesky_ex((gram_KK + gram_KK.mT) / 2 + identity_KK)
    inverse_KK = torch.linalg.solve_triangular(root, identity_KK, upper=False)
    return torch.where((info == 0).unsqueeze(-1).unsqueeze(-1), inverse_KK, torch.zeros_like(inverse_KK))


def _damped_roots(
    factor_DD: Tensor, blocks: list[Tensor], visits: Tensor, gamma: float | Tensor, kappa: float | Tensor, probes: int
) -> Tensor:
    """``X`` of ``[K, D]`` with ``F / gamma - X^T X`` the inverse of ``gamma S + (1-gamma) (I + kappa D C / tr C)``.

    ``blocks`` are statistics ``[R, D]`` of equal weight, ``C`` the mean of their ``V^T V / |V|^2``; a block of zeros adds
    nothing. The identity comes as ``probes`` unit vectors a step, coordinates in turn, each ``sqrt(D / probes)`` long:
    ``visits`` (0-dim int64) counts the steps before. The mean of ``S`` over a cycle is as if the identity were added whole.

    With the ``K`` columns ``P`` of both, a Sherman-Morrison-Woodbury step on ``B = F / gamma``: ``U = P B``,
    ``I + P B P^T = T T^T``, ``X = T^-1 U``. Rows of ``B`` that belong to unit vectors are copies, and nothing is decided on
    the host: where rounding has left no root, there is no step.
    """
    dtype, size = blocks[0].dtype, factor_DD.shape[-1]
    factor = factor_DD.to(dtype)
    gamma_2, kappa_2 = (for_each(x, 2, dtype) for x in (gamma, kappa))
    fresh = 1 - gamma_2
    squared = fresh * kappa_2 * (size / len(blocks))
    columns_RD = torch.cat([_to_length(block, squared, (-2, -1)) for block in blocks], -2)
    index = stored((torch.arange(probes, device=factor.device) + visits.unsqueeze(-1) * probes) % size)
    length = fresh * (size / probes)
    length = length.sqrt() if isinstance(length, Tensor) else length**0.5
    rows_PD = torch.take_along_dim(factor, index.unsqueeze(-1), -2) * length
    pushed_KD = torch.cat([columns_RD @ factor, rows_PD], -2) / gamma_2
    gram_KR = pushed_KD @ columns_RD.mT
    gram_KP = torch.take_along_dim(pushed_KD, index.unsqueeze(-2), -1) * length
    gram_KK = torch.cat([gram_KR, gram_KP], -1)
    return inverse_root(gram_KK) @ pushed_KD  # U itself would be copied to solve


@prim(
    "damped_roots(Tensor factor, Tensor[] blocks, Tensor visits, float gamma, float kappa, int probes) -> Tensor",
    alone=True,
)
def damped_roots(
    factor_DD: Tensor, blocks: list[Tensor], visits: Tensor, gamma: float, kappa: float, probes: int
) -> Tensor:
    return _damped_roots(factor_DD, blocks, visits, gamma, kappa, probes)


@prim(
    "damped_roots_by(Tensor factor, Tensor[] blocks, Tensor visits, Tensor gamma, Tensor kappa, int probes) -> Tensor",
    alone=True,
)
def damped_roots_by(
    factor_DD: Tensor, blocks: list[Tensor], visits: Tensor, gamma: Tensor, kappa: Tensor, probes: int
) -> Tensor:
    return _damped_roots(factor_DD, blocks, visits, gamma, kappa, probes)


def _to_length(x: Tensor, squared: float | Tensor, dims: tuple[int, ...]) -> Tensor:
    """``x`` brought to ``|x|^2 = squared`` over ``dims``; zero stays zero. The largest entry is divided out first: no
    underflow."""
    largest = x.abs().amax(dims, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    found = (scaled * scaled).sum(dims, keepdim=True)
    return scaled * torch.where(found > 0, (squared / found).sqrt(), found)


@prim("damped_update(Tensor factor, Tensor[] blocks, Tensor visits, float gamma, float kappa, int probes) -> Tensor")
def damped_update(
    factor_DD: Tensor, blocks: list[Tensor], visits: Tensor, gamma: float, kappa: float, probes: int
) -> Tensor:
    """``F = S^-1`` one step on, for ``S <- gamma S + (1-gamma) (I + kappa D C / tr C)``, ``[D, D]``."""
    return _damped_update(factor_DD, damped_roots(factor_DD, blocks, visits, gamma, kappa, probes), gamma)


@prim("damped_update_by(Tensor factor, Tensor[] blocks, Tensor visits, Tensor gamma, Tensor kappa, int probes) -> Tensor")
def damped_update_by(
    factor_DD: Tensor, blocks: list[Tensor], visits: Tensor, gamma: Tensor, kappa: Tensor, probes: int
) -> Tensor:
    return _damped_update(factor_DD, damped_roots_by(factor_DD, blocks, visits, gamma, kappa, probes), gamma)


def rounding_of(rows_NM: Tensor) -> Tensor:
    """Squared length up to which the sum of these rows is taken for rounding, 0-dim."""
    return column_square_sum(rows_NM).sum() * (NOISE * torch.finfo(rows_NM.dtype).eps) ** 2


@prim("unless_noise(Tensor vector, Tensor noise) -> Tensor")
def unless_noise(v_D: Tensor, noise: Tensor) -> Tensor:
    """``v``, or zero where ``|v|^2`` does not exceed ``noise`` (0-dim)."""
    return torch.where(((v_D * v_D).sum(-1) > noise).unsqueeze(-1), v_D, torch.zeros_like(v_D))


@prim("scale_to(Tensor vector, float squared_length) -> Tensor")
def scale_to(v_D: Tensor, squared_length: float) -> Tensor:
    """``v`` brought to ``|v|^2 = squared_length``; zero stays zero."""
    return _to_length(v_D, squared_length, (-1,))


@prim("scale_to_by(Tensor vector, Tensor squared_length) -> Tensor")
def scale_to_by(v_D: Tensor, squared_length: Tensor) -> Tensor:
    return _to_length(v_D, for_each(squared_length, 1, v_D.dtype), (-1,))


def as_printed(factor_DD: Tensor, vectors: list[Tensor], gamma: Any) -> Tensor:
    """Algorithm 1 as printed: ``gamma F + w / (gamma^2 (1 + gamma w v^T F v)) F v (F v)^T`` with ``w = (1-gamma) / k``."""
    weight = (1 - gamma) / len(vectors)
    updated = gamma * factor_DD
    for v_D in vectors:
        u_D = (factor_DD * v_D).sum(1)
        coefficient = weight / (gamma**2 * (1 + gamma * weight * (v_D * u_D).sum()))
        updated = updated + torch.outer(coefficient * u_D, u_D)
    return updated


def stabilised(factor_DD: Tensor, threshold: Any, pull: Any) -> Tensor:
    """``pull F + (1 - pull) I`` where ``max |F|`` exceeds the threshold. A positive definite matrix has its largest entry on
    the diagonal, so that costs ``D`` reads."""
    fires = factor_DD.diagonal().abs().amax() > threshold
    identity = torch.eye(factor_DD.shape[0], dtype=factor_DD.dtype, device=factor_DD.device)
    return torch.where(fires, pull * factor_DD + (1 - pull) * identity, factor_DD)
