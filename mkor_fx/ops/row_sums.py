"""Sums over rows and sketches of them, without the rows.

Shape suffixes: ``N`` rows, ``M`` columns, ``R`` sketches, ``B`` images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir import product
from ..prims import accumulation_dtype, column_square_sum, column_sum, signs, sketch
from .rows import batch_axes, histogram, member_rows, one_hot_rows, padded, patch_sum, place, place_rows, unfold_rows


def _member_sum(rows_NM: Tensor, members_N: Tensor, size: int) -> Tensor:
    """``column_sum(member_rows(...))``, ``[size, M]``; rows of member ``size`` belong to none."""
    wide = rows_NM.to(accumulation_dtype(rows_NM.dtype))
    sums = torch.zeros(size + 1, wide.shape[1], dtype=wide.dtype, device=wide.device)
    return sums.index_add(0, members_N, wide)[:size]


def _patch_sketch(images_BCX: Tensor, *arguments: Any) -> Tensor:
    """``sketch(unfold_rows(images), ...)`` without the patches: the weight gradient of a convolution whose ``R`` output
    channels got the signs as gradients."""
    kernel, stride, padding, dilation, surplus, groups, key, side, sketches = arguments
    images = images_BCX.to(torch.float32 if images_BCX.dtype == torch.float16 else images_BCX.dtype)
    axes = zip(images.shape[2:], kernel, stride, padding, dilation, surplus)
    positions = [(x + 2 * p - d * (k - 1) - 1) // s + 1 - last for x, k, s, p, d, last in axes]
    signs_NR = signs(key, side, product([images.shape[0], *positions]), sketches)
    grads = signs_NR.to(images.dtype).reshape(images.shape[0], *positions, -1).movedim(-1, 1)
    for dim, last in enumerate(surplus, 2):
        grads = padded(grads, dim, 0, last)
    weight_RCK = images.new_zeros(sketches, images.shape[1], *kernel)
    flags = [False, True, False]
    found = torch.ops.aten.convolution_backward.default(
        grads, images, weight_RCK, None, stride, padding, dilation, False, [0] * len(kernel), 1, flags
    )[1]
    found = found.to(accumulation_dtype(images_BCX.dtype))
    return found.flatten(1) if groups == 1 else found.reshape(sketches, groups, -1).movedim(1, 0).contiguous()


def _one_hot_sketch(
    indices: Tensor, size: int, padding_idx: int, dtype: torch.dtype, key: Tensor, side: int, sketches: int
) -> Tensor:
    flat = indices.reshape(-1)
    signs_NR = signs(key, side, flat.shape[0], sketches).to(accumulation_dtype(dtype))
    kept = signs_NR * (flat != padding_idx).unsqueeze(-1)
    return torch.zeros(size, sketches, dtype=kept.dtype, device=kept.device).index_add(0, flat, kept).mT.contiguous()


def _member_sketch(rows_NM: Tensor, members_N: Tensor, size: int, key: Tensor, side: int, sketches: int) -> Tensor:
    """``[size, R, M]``, a sketch at a time: rows times signs are never made for all of them."""
    wide = rows_NM.to(accumulation_dtype(rows_NM.dtype))
    signs_NR = signs(key, side, rows_NM.shape[0], sketches).to(wide.dtype)
    return torch.stack([_member_sum(wide * s.unsqueeze(-1), members_N, size) for s in signs_NR.unbind(-1)], -2)


def _squared(x: Tensor) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    return wide * wide


#: sums over rows that need no rows: ``(reduction, producer of the rows)`` -> the same, contiguous, on the producer's
#: arguments and what the reduction is given behind its rows
ROW_SUMS: dict[tuple, Callable] = {
    (column_sum, unfold_rows): patch_sum,
    (column_sum, one_hot_rows): histogram,
    (column_sum, member_rows): _member_sum,
    (column_sum, place_rows): lambda rows, members, columns: place(column_sum(rows), *batch_axes(members), columns),
    (column_square_sum, unfold_rows): lambda images, *geometry: patch_sum(_squared(images), *geometry),
    (column_square_sum, one_hot_rows): histogram,
    (column_square_sum, member_rows): lambda rows, *members: _member_sum(_squared(rows), *members),
    (column_square_sum, place_rows): lambda rows, members, columns: place(
        column_square_sum(rows), *batch_axes(members), columns
    ),
    (sketch, unfold_rows): _patch_sketch,
    (sketch, one_hot_rows): _one_hot_sketch,
    (sketch, member_rows): _member_sketch,
    (sketch, place_rows): lambda rows, members, columns, *drawn: place_rows(sketch(rows, *drawn), members, columns),
}
