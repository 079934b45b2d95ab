"""Semantic ``mkor_fx::`` operators: what a rewritten graph says before it is lowered.

Each operator has a native body in plain torch. Eager execution runs the body; ``passes/lower/expand.py`` traces it and
splices the result, so a graph that reads ``mkor_fx.inverse_update(L, [g], ...)`` ends as ordinary aten operators.

Shape suffixes: ``N`` rows (batch x positions), ``M`` any width, ``O`` outputs, ``I`` inputs, ``D`` one side of a factor.
Operators on a weight's matrices take a batch of them in front. How rows are read off operands is in ``rows.py``. Where a
number may change over time, an operator has a twin ``..._by`` that takes 0-dim tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_library = torch.library.Library("mkor_fx", "DEF")

#: operator -> its native body; what lowering expands
BODIES: dict[torch._ops.OpOverload, Callable] = {}
#: those whose expansion Inductor shall compile by itself, once for all operands that look alike
ALONE: set[torch._ops.OpOverload] = set()
#: of small matrices, of which a GPU shall compute many in one call
STACKED: set[torch._ops.OpOverload] = set()


def prim(
    schema: str, shared: Collection[int] = (), alone: bool = False, stacked: bool = False
) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define ``mkor_fx::<schema>`` with the decorated function as its body on every device.

    Bodies take any leading dimensions ``...``, so the operator under ``vmap`` is the same operator once more. Arguments at
    ``shared`` positions broadcast: what is alike for the whole of a batch is passed as it is. ``alone``: of several small
    kernels, which are not to be fused with what comes before and behind, so that they are the same for every weight.
    ``stacked``: of one small matrix, and takes too little of a GPU to be called for each weight.
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
        if alone:
            ALONE.add(overload)
        if stacked:
            STACKED.add(overload)

        def batched(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
            leaves, spec = pytree.tree_flatten(args)
            dims = pytree.tree_flatten(in_dims, is_leaf=lambda d: d is None)[0]
            if len(dims) != len(leaves):  # a None stands for a whole list
                dims = [
                    d
                    for d, arg in zip(in_dims, args)
                    for d in (pytree.tree_leaves(d) if d is not None else [None] * len(pytree.tree_leaves(arg)))
                ]
            moved = [
                leaf if dim is None and at in shared else _leading(leaf, dim, info.batch_size)
                for at, (leaf, dim) in enumerate(zip(leaves, dims))
            ]
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


def for_each(number: float | Tensor, dims: int, dtype: torch.dtype) -> float | Tensor:
    """A number beside matrices or vectors of ``dims`` dimensions; a tensor is 0-dim, or one number for each of a batch."""
    return number.to(dtype).reshape(*number.shape, *[1] * dims) if isinstance(number, Tensor) else number


def stored(x: Tensor) -> Tensor:
    """``x``, in memory: Inductor writes what ``as_strided`` reads, and otherwise computes it again for every element.

    Without it the update of a factor divides and takes roots ``D^2`` times in a loop that is not vectorised.
    """
    return x.as_strided(x.shape, x.stride())


@prim("precondition(Tensor? left, Tensor grad, Tensor? right) -> Tensor")
def precondition(left_OO: Tensor | None, grad_OI: Tensor, right_II: Tensor | None) -> Tensor:
    """``left @ grad @ right``; ``None`` is the identity. Products run in the dtype of the gradient."""
    direction = grad_OI if left_OO is None else left_OO.to(grad_OI.dtype) @ grad_OI
    return (
        direction.clone()
        if right_II is None and left_OO is None
        else (direction if right_II is None else direction @ right_II.to(grad_OI.dtype))
    )


def _norm(matrix: Tensor, rms: Tensor | None = None) -> Tensor:
    """Norm of a matrix, ``[..., 1, 1]``; from its root mean square (one a matrix) where that is known."""
    if rms is not None:
        return (matrix.shape[-2] * matrix.shape[-1]) ** 0.5 * rms[..., None, None]
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=accumulation_dtype(matrix.dtype))


@prim("rescale(Tensor direction, Tensor grad, Tensor? rms=None) -> Tensor")
def rescale(direction: Tensor, grad: Tensor, rms: Tensor | None = None) -> Tensor:
    """``direction * |grad| / |direction|``; where that quotient is zero or not finite, the raw gradient. ``rms`` is the
    direction's root mean square, where it is known."""
    quotient = _norm(grad) / _norm(direction, rms)
    usable = torch.isfinite(quotient) & (quotient > 0)
    return torch.where(usable, direction * quotient.to(direction.dtype), grad)


@prim("graft_rms(Tensor direction, Tensor? rms=None, Tensor? to=None) -> Tensor")
def graft_rms(direction: Tensor, rms: Tensor | None = None, to: Tensor | None = None) -> Tensor:
    """``direction`` brought to a root mean square of ``to`` (one a matrix), None: of 0.2, that of an Adam update in noise;
    zero, and what is not finite, is zero. ``rms`` is its own, where it is known."""
    quotient = (direction.shape[-2] * direction.shape[-1]) ** 0.5 / _norm(direction, rms)
    quotient = quotient * (0.2 if to is None else to[..., None, None])
    usable = torch.isfinite(quotient) & (quotient > 0)
    return torch.where(usable, direction * quotient.to(direction.dtype), torch.zeros_like(direction))


# ---- random numbers -------------------------------------------------------------------------------------------------

#: sketches whose signs are bits of one hash
_WORD = 24


@prim("rademacher(Tensor step, int side, int size, ScalarType dtype) -> Tensor")
def rademacher(step: Tensor, side: int, size: int, dtype: torch.dtype) -> Tensor:
    """``size`` signs, a hash of (step, side, index): the same on every rank, backend and device, and after a resume."""
    h = (torch.arange(size, device=step.device) + 1 + 7919 * step.to(torch.int64) + 104729 * side) & 0x7FFFFFFF
    return (1 - 2 * ((_mixed(h) >> 7) & 1)).to(dtype)


def signs(key: Tensor, side: int, rows: int, sketches: int) -> Tensor:
    """``[rows, sketches]`` signs, a hash of (key, side, row, sketch): the same on every backend and device. Other keys and
    sides give independent ones."""
    seed = _seed(key, side)
    bits = []
    for at in range(0, sketches, _WORD):
        hashed = _mixed(_mixed(seed ^ (at // _WORD)) ^ torch.arange(rows, device=key.device))
        places = torch.arange(min(_WORD, sketches - at), device=key.device)
        bits.append((hashed.unsqueeze(-1) >> (places + 4)) & 1)
    return (1 - 2 * (bits[0] if len(bits) == 1 else torch.cat(bits, -1))).to(torch.int8)


def uniforms(key: Tensor, side: int, count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` numbers, uniform in (0, 1), a hash of (key, side, index) as that of :func:`signs`. Of 2^23 values, each
    exact in float32."""
    hashed = _mixed(_seed(key, side) ^ torch.arange(count, device=key.device))
    return ((hashed >> 8).to(dtype) + 0.5) / 2**23


def normals(key: Tensor, side: int, count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` standard normal numbers by the same hash (Box and Muller, 1958), on every device alike up to rounding."""
    radius, turn = (uniforms(key, 2 * side + half, count, dtype) for half in range(2))
    return (-2 * radius.log()).sqrt() * (2 * math.pi * turn).cos()


def _seed(key: Tensor, side: int) -> Tensor:
    key = key.to(torch.int64)
    low, high = key & 0x7FFFFFFF, (key >> 31) & 0x7FFFFFFF
    return _mixed(_mixed(_mixed(low) ^ high) ^ (side + 1))


def _mixed(h: Tensor) -> Tensor:
    """A permutation of 31-bit numbers in which every bit depends on all. Each round reads its operand twice: what is not
    stored, Inductor would write out as many times as there are paths."""
    for _ in range(2):
        h = stored((((h >> 16) ^ h) * 0x45D9F3B) & 0x7FFFFFFF)
    return stored((h >> 16) ^ h)


@prim("sketch(Tensor rows, Tensor key, int side, int sketches) -> Tensor", shared=(1,))
def sketch(rows_NM: Tensor, key: Tensor, side: int, sketches: int) -> Tensor:
    """``signs(key, side, N, R)^T rows``, ``[R, M]``: each is an unbiased sketch, ``E[v v^T] = rows^T rows``. One skinny
    product, of what has the range of float32 in its own dtype. Members of a batch share their signs."""
    dtype = torch.float32 if rows_NM.dtype == torch.float16 else rows_NM.dtype
    signs_NR = signs(key, side, rows_NM.shape[-2], sketches)
    return (signs_NR.to(dtype).mT @ rows_NM.to(dtype)).to(accumulation_dtype(rows_NM.dtype))
