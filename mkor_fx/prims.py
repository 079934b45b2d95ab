"""Semantic ``mkor_fx::`` operators: what a rewritten graph says before it is lowered.

Each operator has a native body in plain torch. Eager execution runs the body; ``passes/lower/expand.py`` traces it and
splices the result, so a graph that reads ``mkor_fx.inverse_update(L, [g], ...)`` ends as ordinary aten operators.

Shape suffixes: ``N`` rows (batch x positions), ``M`` any width, ``O`` outputs, ``I`` inputs, ``D`` one side of a factor.
Operators on a weight's matrices take a batch of them in front. How rows are read off operands is in ``rows.py``. Where a
number may change over time, an operator has a twin ``..._by`` that takes 0-dim tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_library = torch.library.Library("mkor_fx", "DEF")

#: operator -> its native body; what lowering expands
BODIES: dict[torch._ops.OpOverload, Callable] = {}


def prim(schema: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define ``mkor_fx::<schema>`` with the decorated function as its body on every device.

    Bodies take any leading dimensions ``...``, so the operator under ``vmap`` is the same operator once more.
    """

    def register(body: Callable) -> torch._ops.OpOverload:
        name = schema[: schema.index("(")]
        _library.define(schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"mkor_fx::{name}", body, lib=_library
        )  # through fake tensors: sizes may be symbolic
        overload = getattr(torch.ops.mkor_fx, name).default
        BODIES[overload] = body

        def batched(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
            leaves, spec = pytree.tree_flatten(args)
            dims = pytree.tree_flatten(in_dims, is_leaf=lambda d: d is None)[0]
            if len(dims) != len(leaves):  # a None stands for a whole list
                dims = [
                    d
                    for d, arg in zip(in_dims, args)
                    for d in (pytree.tree_leaves(d) if d is not None else [None] * len(pytree.tree_leaves(arg)))
                ]
            moved = [_leading(leaf, dim, info.batch_size) for leaf, dim in zip(leaves, dims)]
            return overload(*pytree.tree_unflatten(moved, spec)), 0

        torch.library.register_vmap(f"mkor_fx::{name}", batched, lib=_library)
        return overload

    return register


def _leading(leaf: Any, dim: int | None, batch: int) -> Any:
    """An argument under ``vmap`` with its batch as the first dimension."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.expand(batch, *leaf.shape) if dim is None else leaf.movedim(dim, 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and factor updates are computed in float32, in float64 only for float64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@prim("column_sum(Tensor rows) -> Tensor")
def column_sum(rows_NM: Tensor) -> Tensor:
    """``sum_n rows[n]``, ``[M]``, accumulated in float32 (float64 for float64 rows)."""
    return rows_NM.sum(-2, dtype=accumulation_dtype(rows_NM.dtype))


@prim("column_square_sum(Tensor rows) -> Tensor")
def column_square_sum(rows_NM: Tensor) -> Tensor:
    """``sum_n rows[n]**2``, ``[M]``, accumulated as ``column_sum`` and in the same pass over the rows."""
    wide = rows_NM.to(accumulation_dtype(rows_NM.dtype))
    return (wide * wide).sum(-2)


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
    scale_1, shift_1, weight_1 = (_for_each(x, 1, factor.dtype) for x in (scale, shift, weight))
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
    updated = _for_each(scale, 2, factor.dtype) * factor + _for_each(shift, 2, factor.dtype) * identity
    for root_D in roots:
        updated = updated - root_D.unsqueeze(-1) * root_D.unsqueeze(-2)
    return updated.to(factor_DD.dtype)


@prim("inverse_update(Tensor factor, Tensor[] vectors, float scale, float shift, float weight) -> Tensor")
def inverse_update(factor_DD: Tensor, vectors: list[Tensor], scale: float, shift: float, weight: float) -> Tensor:
    return _inverse_update(factor_DD, vectors, scale, shift, weight)


@prim("inverse_update_by(Tensor factor, Tensor[] vectors, Tensor scale, Tensor shift, Tensor weight) -> Tensor")
def inverse_update_by(factor_DD: Tensor, vectors: list[Tensor], scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return _inverse_update(factor_DD, vectors, scale, shift, weight)


def _for_each(number: float | Tensor, dims: int, dtype: torch.dtype) -> float | Tensor:
    """A number beside matrices or vectors of ``dims`` dimensions; a tensor is 0-dim, or one number for each of a batch."""
    return number.to(dtype).reshape(*number.shape, *[1] * dims) if isinstance(number, Tensor) else number


def stored(x: Tensor) -> Tensor:
    """``x``, in memory: Inductor writes what ``as_strided`` reads, and otherwise computes it again for every element.

    Without it the update of a factor divides and takes roots ``D^2`` times in a loop that is not vectorised.
    """
    return x.as_strided(x.shape, x.stride())


@prim("unless_noise(Tensor vector, Tensor noise) -> Tensor")
def unless_noise(v_D: Tensor, noise: Tensor) -> Tensor:
    """``v``, or zero where ``|v|^2`` does not exceed ``noise`` (0-dim)."""
    return torch.where(((v_D * v_D).sum(-1) > noise).unsqueeze(-1), v_D, torch.zeros_like(v_D))


def _scale_to(v_D: Tensor, squared_length: float | Tensor) -> Tensor:
    """``v`` brought to ``|v|^2 = squared_length``; zero stays zero. The largest entry is divided out first: no underflow."""
    largest = v_D.abs().amax(-1, keepdim=True)
    scaled = v_D / torch.where(largest > 0, largest, torch.ones_like(largest))
    squared = (scaled * scaled).sum(-1, keepdim=True)
    length = _for_each(squared_length, 1, v_D.dtype)
    return scaled * torch.where(squared > 0, (length / squared).sqrt(), squared)


@prim("scale_to(Tensor vector, float squared_length) -> Tensor")
def scale_to(v_D: Tensor, squared_length: float) -> Tensor:
    return _scale_to(v_D, squared_length)


@prim("scale_to_by(Tensor vector, Tensor squared_length) -> Tensor")
def scale_to_by(v_D: Tensor, squared_length: Tensor) -> Tensor:
    return _scale_to(v_D, squared_length)


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
    norms = [torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True, dtype=dtype) for t in (grad, direction)]
    quotient = norms[0] / norms[1]
    usable = torch.isfinite(quotient) & (quotient > 0)
    return torch.where(usable, direction * quotient.to(direction.dtype), grad)


@prim("graft_rms(Tensor direction) -> Tensor")
def graft_rms(direction: Tensor) -> Tensor:
    """``direction`` brought to a root mean square of 0.2, that of an Adam update; zero, and what is not finite, is zero."""
    norm = torch.linalg.vector_norm(direction, dim=(-2, -1), keepdim=True, dtype=accumulation_dtype(direction.dtype))
    quotient = 0.2 * (direction.shape[-2] * direction.shape[-1]) ** 0.5 / norm
    usable = torch.isfinite(quotient) & (quotient > 0)
    return torch.where(usable, direction * quotient.to(direction.dtype), torch.zeros_like(direction))


@prim("rademacher(Tensor step, int side, int size, ScalarType dtype) -> Tensor")
def rademacher(step: Tensor, side: int, size: int, dtype: torch.dtype) -> Tensor:
    """``size`` signs, a hash of (step, side, index): the same on every rank, backend and device, and after a resume."""
    h = (torch.arange(size, device=step.device) + 1 + 7919 * step.to(torch.int64) + 104729 * side) & 0x7FFFFFFF
    for _ in range(2):
        h = (((h >> 16) ^ h) * 0x45D9F3B) & 0x7FFFFFFF
    h = (h >> 16) ^ h
    return (1 - 2 * ((h >> 7) & 1)).to(dtype)
