"""Rows ``[N, M]`` of a weight's product, read off the operands of an operation: what op table rows are made of.

Some rows are too many to make. They are semantic operators, and ``row_sums.py`` says how their sums are had without them.

Shape suffixes: ``N`` rows, ``M`` columns, ``E`` members of a batched weight (experts, a convolution's groups), ``B`` images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ir import product
from ..prims import accumulation_dtype, prim

# ---- views ----------------------------------------------------------------------------------------------------------


def as_rows(x_NM: Tensor) -> Tensor:
    return x_NM


def as_columns(x_MN: Tensor) -> Tensor:
    """``[*, M, N] -> [*, N, M]``"""
    return x_MN.transpose(-1, -2)


def only_member(x: Tensor, view: Callable) -> Tensor:
    """``[1, N, M] -> [N, M]``"""
    return view(x)[0]


def flat_rows(x: Tensor) -> Tensor:
    """``[*, M] -> [N, M]``"""
    return x.reshape(-1, x.shape[-1])


def positions(images_BCX: Tensor, groups: int) -> Tensor:
    """``[B, C, *spatial] -> [B * positions, C]``, ``[groups, B * positions, C / groups]`` where there are several."""
    return _split_columns(flat_rows(images_BCX.movedim(1, -1)), groups)


def looked_up(grad: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    """``[*, D] -> [N, D]``, rows of ``padding_idx`` set to zero."""
    rows = flat_rows(grad)
    return torch.where((indices.reshape(-1, 1) == padding_idx), torch.zeros_like(rows), rows)


def not_padding(indices: Tensor, padding_idx: int) -> Tensor:
    """How many rows are not padding, 0-dim."""
    return (indices != padding_idx).sum()


def outer_rows(x_NI: Tensor, y_NJ: Tensor) -> Tensor:
    """``[N, I * J]``"""
    return (x_NI.unsqueeze(-1) * y_NJ.unsqueeze(-2)).flatten(-2)


def _split_columns(rows_NM: Tensor, groups: int) -> Tensor:
    """``[N, groups * M] -> [groups, N, M]``"""
    if groups == 1:
        return rows_NM
    return rows_NM.unflatten(-1, (groups, -1)).movedim(-2, 0)


# ---- convolutions ---------------------------------------------------------------------------------------------------

_GEOMETRY = "SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] surplus, int groups"


@prim(f"unfold_rows(Tensor images, {_GEOMETRY}) -> Tensor")
def unfold_rows(images_BCX: Tensor, *geometry: Sequence[int] | int) -> Tensor:
    """Rows that a convolution multiplies with its weight: ``[B * positions, C * prod(kernel)]`` patches of
    ``[B, C, *spatial]``, ``[groups, B * positions, C / groups * prod(kernel)]`` where there are several groups."""
    spatial = images_BCX.dim() - 2
    windows = _windows(images_BCX, *geometry[:-1])  # [B, C, *positions, *kernel]
    rows = windows.movedim(1, spatial + 1).flatten(spatial + 1).flatten(0, spatial)
    return _split_columns(rows, geometry[-1])  # type: ignore[arg-type]


@prim(f"patch_sum(Tensor images, {_GEOMETRY}) -> Tensor")
def patch_sum(images_BCX: Tensor, *geometry: Sequence[int] | int) -> Tensor:
    """``column_sum(unfold_rows(images))`` without the patches: sums the batch first, unfolds one image."""
    image = images_BCX.sum(0, keepdim=True, dtype=accumulation_dtype(images_BCX.dtype))
    spatial = images_BCX.dim() - 2
    sums = _windows(image, *geometry[:-1]).sum((0, *range(2, spatial + 2))).flatten()
    return sums if geometry[-1] == 1 else sums.reshape(geometry[-1], -1)  # type: ignore[call-overload]


def _windows(
    images_BCX: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    surplus: Sequence[int],
) -> Tensor:
    """``[B, C, *positions, *kernel]``: what each output position of a convolution sees, in any number of dimensions.

    The last ``surplus`` positions are left out (of a transposed convolution whose output is padded by a stride or more).
    """
    windows = images_BCX
    for dim, p in enumerate(padding, 2):
        windows = padded(windows, dim, p, p)
    for dim, (k, s, d, last) in enumerate(zip(kernel, stride, dilation, surplus), 2):
        windows = windows.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        windows = windows.narrow(dim, 0, windows.shape[dim] - last) if last else windows
    return windows


def padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros on both sides of a dimension."""
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, after]) if before or after else x


# ---- lookups and routing --------------------------------------------------------------------------------------------


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


@prim("member_rows(Tensor rows, Tensor members, int size) -> Tensor")
def member_rows(rows_NM: Tensor, members_N: Tensor, size: int) -> Tensor:
    """``[size, N, M]``: each row in its member, zero in the others."""
    own = members_N == torch.arange(size, device=members_N.device).unsqueeze(-1)
    return torch.where(own.unsqueeze(-1), rows_NM, 0)


def gathered_rows(x: Tensor, view: Callable, ids: Tensor, size: int) -> Tensor:
    """``[S, n, M]`` with a member for each of the ``S``: ``[size, S * n, M]``"""
    rows_SNM = view(x)
    members = ids.reshape(-1, 1).expand(-1, rows_SNM.shape[1]).reshape(-1)
    return member_rows(rows_SNM.flatten(0, 1), members, size)


def count_gathered(ids: Tensor, rows: int, size: int) -> Tensor:
    """``[size]``"""
    return histogram(ids, size, -1, torch.float32) * rows


def segment_rows(x: Tensor, view: Callable, ends_E: Tensor) -> Tensor:
    """Rows sorted by member, each member's up to its end: ``[E, N, M]``"""
    rows_NM = view(x)
    members = (torch.arange(rows_NM.shape[0], device=rows_NM.device).unsqueeze(-1) >= ends_E).sum(-1)
    return member_rows(rows_NM, members, ends_E.shape[0])


def count_segments(ends_E: Tensor) -> Tensor:
    """``[E]``"""
    return ends_E - torch.nn.functional.pad(ends_E[:-1], (1, 0))


def broadcast_rows(x: Tensor, view: Callable, lead: Sequence[int], summed: Sequence[int]) -> Tensor:
    """Rows of a batch ``lead`` of which the dimensions ``summed`` are rows, too: ``[N, M]`` or ``[E, N, M]``."""
    rows = view(x)
    rows = rows.reshape(*lead, *rows.shape[1:])
    kept = [d for d in range(len(lead)) if d not in summed]
    rows = rows.permute(*kept, *summed, len(lead), len(lead) + 1)
    members = product(lead[d] for d in kept)
    return rows.reshape(*((members,) if members > 1 else ()), -1, rows.shape[-1])


# ---- pieces of a weight ---------------------------------------------------------------------------------------------


@prim("place_rows(Tensor rows, int[] members, int[] columns) -> Tensor")
def place_rows(rows_NM: Tensor, members: list[int], columns: list[int]) -> Tensor:
    """Rows of a piece of a weight as rows of the whole of it, zero elsewhere.

    ``columns`` are ``(size, start, full)`` of each axis that makes up the columns; so are ``members`` of the batch, empty
    where the weight has none. ``[N, M]`` or ``[E, N, M]`` become ``[N, full M]`` or ``[full E, N, full M]``.
    """
    rows = rows_NM.shape[-2]
    return place(rows_NM, *batch_axes(members), [rows, 0, rows], columns)


def batch_axes(members: list[int]) -> list[list[int]]:
    return [members] if members else []


def place(x: Tensor, *groups: list[int]) -> Tensor:
    axes = [axis for group in groups for axis in zip(group[0::3], group[1::3], group[2::3])]
    placed = x.reshape([size for size, _, _ in axes])
    for dim, (size, start, full) in enumerate(axes):
        if size is not full:  # the number of rows may be symbolic, but is always whole
            placed = padded(placed, dim, start, full - start - size)
    return placed.reshape([product(group[2::3]) for group in groups])


# ---- operands of operands: ``viewed`` is ``(view, *arguments)`` of one that is read first ---------------------------


def seen(x: Tensor, viewed: tuple) -> Tensor:
    return viewed[0](x, *viewed[1:])


def placed_rows(x: Tensor, viewed: tuple, members: list[int], columns: list[int]) -> Tensor:
    return place_rows(seen(x, viewed), members, columns)


def placed_count(x: Tensor, viewed: tuple, members: list[int]) -> Tensor:
    """The number of rows of each member, ``[full E]``."""
    return place(seen(x, viewed).expand(product(members[0::3])), members)


def count_all(x: Tensor, viewed: tuple) -> Tensor:
    """How many rows there are, of each member."""
    return torch.ones_like(seen(x, viewed)[..., 0], dtype=torch.int64).sum(-1)


def live_rows(g_ENO: Tensor, viewed: tuple) -> Tensor:
    """Which rows have a gradient, ``[E, N]``: the others are a member's padding, or were routed elsewhere."""
    return (seen(g_ENO, viewed) != 0).any(-1)


def count_live(g_ENO: Tensor, viewed: tuple) -> Tensor:
    """``[E]``"""
    return live_rows(g_ENO, viewed).sum(-1)


def where_live(a_ENI: Tensor, viewed: tuple, g_ENO: Tensor, g_viewed: tuple) -> Tensor:
    """Rows without a gradient set to zero."""
    return torch.where(live_rows(g_ENO, g_viewed).unsqueeze(-1), seen(a_ENI, viewed), 0)
