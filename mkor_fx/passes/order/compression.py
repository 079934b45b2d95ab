"""What owners send in few bits, with a bound on every element's error (COMPSO, PPoPP 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...prims import accumulation_dtype, uniforms

#: bits of a number on its way
WIDTHS = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Directions on their way from owners to the other ranks in a few bits an element.

    Of each tensor ``x`` (or the part of one that a bucket has), with ``M = max |x|`` and ``delta = bound * M``:

        ``q_i = floor(x_i / delta + u_i)``,  ``u`` uniform in (0, 1);   received is ``delta q``

    so that ``E[delta q] = x``, ``|delta q - x| <= delta`` and the variance is at most ``delta^2 / 4``. With a
    ``filter`` what is not larger than ``filter * M`` becomes 0, which is biased. All ranks use what was received, the
    owner too. ``u`` are hashes of the step and of the parameter's name. COMPSO's ``e_q`` is half of ``bound``, its
    ``e_f`` the ``filter``.

    Collectives in a program have lengths that are known beforehand, so every element takes the ``bits`` that the bound
    needs, and ``M`` four bytes a tensor (eight of float64). An entropy coder, and a bitmap of what was filtered, would
    only pay with lengths that depend on the data: there is neither, and the filter saves no byte.

    Args:
        bound: of an element's error, as a part of the largest, in (0, 1]: from 1/7 on four bits, from 1/127 eight, from
        1/32767
            sixteen.
        filter: what is dropped, as a part of the largest, in [0, 1).

    Raises:
        ValueError: for a number outside its range, naming it.
    """

    bound: float = 1 / 127
    filter: float = 0.0

    def __post_init__(self) -> None:
        for name, fits, said in (
            ("bound", lambda x: 2**-24 <= x <= 1, "in [2^-24, 1], of the largest element, e.g. 1/127"),
            ("filter", lambda x: 0 <= x < 1, "in [0, 1), of the largest element; 0 drops nothing"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
                raise ValueError(f"Compression({name}={value!r}): must be {said}")

    @property
    def levels(self) -> int:
        """The largest ``|q|``."""
        return math.ceil(1 / self.bound - 1e-9)

    @property
    def bits(self) -> int:
        """Of an element."""
        return next(width for width in WIDTHS if self.levels < 1 << (width - 1))

    def bytes(self, count: int, tensors: int, dtype: torch.dtype) -> int:
        """What ``count`` elements of so many ``tensors`` take."""
        return -(-count * self.bits // 8) + tensors * accumulation_dtype(dtype).itemsize


def pack(
    tensors: Sequence[Tensor],
    key: Tensor,
    sides: Sequence[int],
    length: int,
    slots: int,
    dtype: torch.dtype,
    how: Compression,
) -> Tensor:
    """``tensors``, of ``dtype`` each, one behind the other in ``length`` elements, as bytes, uint8: the largest of each
    in ``slots`` places, then the elements. ``key``, 0-dim int64, and ``sides`` are what is drawn by."""
    wide = accumulation_dtype(dtype)
    flat = [x.reshape(-1).to(wide) for x in tensors]
    largest = [x.abs().amax() for x in flat]
    codes = [_quantised(x, most, uniforms(key, side, x.numel(), wide), how) for x, most, side in zip(flat, largest, sides)]
    missing = -(-length * how.bits // 8) * 8 // how.bits - sum(x.numel() for x in flat)
    if missing:
        codes.append(torch.zeros(missing, dtype=torch.int32, device=key.device))
    scales = torch.zeros(slots, dtype=wide, device=key.device)
    if largest:
        scales = torch.cat([torch.stack(largest), scales[len(largest) :]])
    whole = torch.int64 if wide == torch.float64 else torch.int32
    return torch.cat([_to_bytes(scales.view(whole), 8 * wide.itemsize), _to_bytes(torch.cat(codes), how.bits)])


def unpack(sent: Tensor, counts: Sequence[int], slots: int, dtype: torch.dtype, how: Compression) -> Tensor:
    """What :func:`pack` has sent: tensors of so many elements one behind the other, in ``dtype``."""
    wide = accumulation_dtype(dtype)
    head, whole = slots * wide.itemsize, torch.int64 if wide == torch.float64 else torch.int32
    scales = _from_bytes(sent[:head], 8 * wide.itemsize).to(whole).view(wide)
    codes = _from_bytes(sent[head:], how.bits)[: sum(counts)].to(wide)
    steps = [(how.bound * scales[at]).expand(count) for at, count in enumerate(counts)]
    return (codes * torch.cat(steps)).to(dtype) if steps else codes.to(dtype)


def _quantised(x: Tensor, largest: Tensor, u: Tensor, how: Compression) -> Tensor:
    step = how.bound * largest
    q = torch.floor(x / torch.where(step > 0, step, torch.ones_like(step)) + u).clamp(-how.levels, how.levels)
    if how.filter:
        q = torch.where(x.abs() > how.filter * largest, q, torch.zeros_like(q))
    return q.to(torch.int32)


def _to_bytes(whole: Tensor, bits: int) -> Tensor:
    """Integers as two's complement of so many bits, the lowest byte first; of four bits two share a byte."""
    if bits == 4:
        return ((whole[0::2] & 15) | ((whole[1::2] & 15) << 4)).to(torch.uint8)
    return torch.stack([((whole >> at) & 255).to(torch.uint8) for at in range(0, bits, 8)], -1).reshape(-1)


def _from_bytes(sent: Tensor, bits: int) -> Tensor:
    """Of ``_to_bytes``, int64."""
    wide = sent.to(torch.int64)
    if bits == 4:
        whole = torch.stack([wide & 15, wide >> 4], -1).reshape(-1)
    else:
        parts = wide.reshape(-1, bits // 8)
        whole = parts[:, 0]
        for at in range(1, bits // 8):
            whole = whole | (parts[:, at] << (8 * at))
    return whole if bits == 64 else (whole ^ (1 << (bits - 1))) - (1 << (bits - 1))
