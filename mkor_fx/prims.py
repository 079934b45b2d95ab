"""Semantic ``mkor_fx::`` operators: what a rewritten graph says before it is lowered.

Each operator has a native body in plain torch. Eager execution runs the body; ``passes/lower.py`` traces it and
splices the result, so a graph that reads ``mkor_fx.inverse_update(L, [g], ...)`` ends as ordinary aten operators.

Shape suffixes: ``N`` rows (batch x positions), ``M`` any width, ``O`` outputs, ``I`` inputs, ``D`` one side of a factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("mkor_fx", "DEF")

#: operator -> its native body; what lowering expands
BODIES: dict[torch._ops.OpOverload, Callable] = {}


def prim(schema: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define ``mkor_fx::<schema>`` with the decorated function as its body on every device."""

    def register(body: Callable) -> torch._ops.OpOverload:
        name = schema[: schema.index("(")]
        _library.define(schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        overload = getattr(torch.ops.mkor_fx, name).default
        BODIES[overload] = body
        return overload

    return register


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and factor updates are computed in float32, in float64 only for float64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@prim("column_sum(Tensor rows) -> Tensor")
def column_sum(rows_NM: Tensor) -> Tensor:
    """``sum_n rows[n]``, ``[M]``, accumulated in float32 (float64 for float64 rows)."""
    return rows_NM.sum(0, dtype=accumulation_dtype(rows_NM.dtype))


@prim("column_square_sum(Tensor rows) -> Tensor")
def column_square_sum(rows_NM: Tensor) -> Tensor:
    """``sum_n rows[n]**2``, ``[M]``, accumulated as ``column_sum`` and in the same pass over the rows."""
    wide = rows_NM.to(accumulation_dtype(rows_NM.dtype))
    return (wide * wide).sum(0)


@prim("unfold_rows(Tensor images, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor")
def unfold_rows(
    images: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Rows that a convolution multiplies with its weight: ``[B*H_out*W_out, C*kh*kw]`` patches of ``[B, C, H, W]``."""
    patches = torch.ops.aten.im2col(images, kernel, dilation, padding, stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


@prim("patch_sum(Tensor images, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor")
def patch_sum(images: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """``column_sum(unfold_rows(images))`` without the patches: sums the batch first, unfolds one image."""
    image = images.sum(0, keepdim=True, dtype=accumulation_dtype(images.dtype))
    return torch.ops.aten.im2col(image, kernel, dilation, padding, stride).sum((0, 2))


@prim("one_hot_rows(Tensor indices, int size, int padding_idx, ScalarType dtype) -> Tensor")
def one_hot_rows(indices: Tensor, size: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """Rows that an embedding multiplies with its weight: ``[N, size]`` one-hots; ``padding_idx`` rows are zero."""
    flat = indices.reshape(-1, 1)
    hot = flat == torch.arange(size, device=indices.device)
    return (hot & (flat != padding_idx)).to(dtype)


@prim("histogram(Tensor indices, int size, int padding_idx, ScalarType dtype) -> Tensor")
def histogram(indices: Tensor, size: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """``column_sum(one_hot_rows(indices))`` without the one-hots, ``[size]``: how often each row was looked up."""
    flat = indices.reshape(-1)
    counts = torch.zeros(size, dtype=accumulation_dtype(dtype), device=indices.device)
    return counts.index_add(0, flat, (flat != padding_idx).to(counts.dtype))


@prim("inverse_update(Tensor factor, Tensor[] vectors, float scale, float shift, float weight) -> Tensor")
def inverse_update(factor_DD: Tensor, vectors: list[Tensor], scale: float, shift: float, weight: float) -> Tensor:
    """Sherman-Morrison steps on an inverse factor, in the dtype of the vectors.

    With ``B_0 = scale * F + shift * I`` returns ``B_k``, where ``B_j = B_{j-1} - weight u u^T / (1 + weight v_j^T u)``
    and ``u = B_{j-1} v_j``, that is ``inverse(inverse(B_0) + weight * sum_j v_j v_j^T)``, ``[D, D]``. All products with
    the matrix read ``F`` once; the later vectors are corrected by the earlier ones, so that the factor is read twice and
    written once whatever their number. A divisor that is not positive (a factor that rounding has made indefinite) skips
    its step.
    """
    factor = factor_DD.to(vectors[0].dtype)
    roots: list[Tensor] = []  # r_j with r r^T = weight u u^T / (1 + weight v^T u): a symmetric step stays symmetric
    for v_D in map(stored, vectors):
        u_D = scale * (factor * v_D).sum(1) + shift * v_D
        for root_D in roots:
            u_D = u_D - root_D * (root_D * v_D).sum()
        u_D = stored(u_D)
        divisor = 1 + weight * (v_D * u_D).sum()
        roots.append(stored(u_D * torch.where(divisor > 0, weight / divisor, torch.zeros_like(divisor)).sqrt()))
    index_D = stored(torch.arange(factor.shape[0], dtype=factor.dtype, device=factor.device))
    updated = scale * factor + shift * (index_D[:, None] == index_D).to(factor.dtype)
    for root_D in roots:
        updated = updated - torch.outer(root_D, root_D)
    return updated.to(factor_DD.dtype)


def stored(x: Tensor) -> Tensor:
    """``x``, in memory: Inductor writes what ``as_strided`` reads, and otherwise computes it again for every element.

    Without it the update of a factor divides and takes roots ``D^2`` times in a loop that is not vectorised.
    """
    return x.as_strided(x.shape, x.stride())


@prim("unless_noise(Tensor vector, Tensor noise) -> Tensor")
def unless_noise(v_D: Tensor, noise: Tensor) -> Tensor:
    """``v``, or zero where ``|v|^2`` does not exceed ``noise`` (0-dim)."""
    return torch.where((v_D * v_D).sum() > noise, v_D, torch.zeros_like(v_D))


@prim("scale_to(Tensor vector, float squared_length) -> Tensor")
def scale_to(v_D: Tensor, squared_length: float) -> Tensor:
    """``v`` brought to ``|v|^2 = squared_length``; zero stays zero. The largest entry is divided out first: no underflow."""
    largest = v_D.abs().amax()
    scaled = v_D / torch.where(largest > 0, largest, torch.ones_like(largest))
    squared = (scaled * scaled).sum()
    return scaled * torch.where(squared > 0, (squared_length / squared).sqrt(), squared)


@prim("precondition(Tensor? left, Tensor grad, Tensor? right) -> Tensor")
def precondition(left_OO: Tensor | None, grad_OI: Tensor, right_II: Tensor | None) -> Tensor:
    """``left @ grad @ right``; ``None`` is the identity. Products run in the dtype of the gradient."""
    direction = grad_OI if left_OO is None else left_OO.to(grad_OI.dtype) @ grad_OI
    return (
        direction.clone()
        if right_II is None and left_OO is None
        else (direction if right_II is None else direction @ right_II.to(grad_OI.dtype))
    )


@prim("rescale(Tensor direction, Tensor grad) -> Tensor")
def rescale(direction: Tensor, grad: Tensor) -> Tensor:
    """``direction * |grad| / |direction|``; where that quotient is zero or not finite, the raw gradient."""
    dtype = accumulation_dtype(grad.dtype)
    quotient = torch.linalg.vector_norm(grad, dtype=dtype) / torch.linalg.vector_norm(direction, dtype=dtype)
    usable = torch.isfinite(quotient) & (quotient > 0)
    return torch.where(usable, direction * quotient.to(direction.dtype), grad)


@prim("rademacher(Tensor step, int side, int size, ScalarType dtype) -> Tensor")
def rademacher(step: Tensor, side: int, size: int, dtype: torch.dtype) -> Tensor:
    """``size`` signs, a hash of (step, side, index): the same on every rank, backend and device, and after a resume."""
    h = (torch.arange(size, device=step.device) + 1 + 7919 * step.to(torch.int64) + 104729 * side) & 0x7FFFFFFF
    for _ in range(2):
        h = (((h >> 16) ^ h) * 0x45D9F3B) & 0x7FFFFFFF
    h = (h >> 16) ^ h
    return (1 - 2 * ((h >> 7) & 1)).to(dtype)


def _patch_square_sum(images: Tensor, *geometry: list[int]) -> Tensor:
    wide = images.to(accumulation_dtype(images.dtype))
    return patch_sum(wide * wide, *geometry)


#: sums over rows that need no rows: ``(reduction, producer of the rows)`` -> the same on the producer's arguments
ROW_SUMS: dict[tuple, Callable] = {
    (column_sum, unfold_rows): patch_sum,
    (column_sum, one_hot_rows): histogram,
    (column_square_sum, unfold_rows): _patch_square_sum,
    (column_square_sum, one_hot_rows): histogram,
}
