"""Batches in parts: how they are cut, and the sums of what their parts come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor


class BatchPart(NamedTuple):
    """Of a batch: which, 0 first, and its share of the rows."""

    number: int = 0
    share: float = 1.0


class Sums:
    """Tensors by key, made as zeros when a program first asks for them; of one step at a time."""

    def __init__(self) -> None:
        self._held: dict[tuple, Tensor] = {}

    def of(self, key: tuple, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self._held.get(key)
        if held is None or (held.shape, held.dtype, held.device) != (shape, dtype, device):
            held = self._held[key] = torch.zeros(shape, dtype=dtype, device=device)
        return held

    def clear(self) -> None:
        for held in self._held.values():
            held.zero_()


def cut(args: tuple, kwargs: dict[str, Any], count: int) -> list[tuple[tuple, dict[str, Any], float]]:
    """A call's arguments as those of at most ``count`` calls, and each one's share of the rows; the last may be smaller.

    Cut along their first dimension are tensors that have as many rows as the last of them, which is the target; the
    others go whole.

    Raises:
        ValueError: no tensor among them has rows.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        raise ValueError(
            "accumulate cuts a batch along its first dimension: the step was called without a tensor that has one"
        )
    rows, parts = sizes[-1], []
    length = -(-rows // count)
    for begin in range(0, rows, length):
        end = min(begin + length, rows)
        is_cut = [isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows for leaf in leaves]
        own = [leaf[begin:end] if divided else leaf for leaf, divided in zip(leaves, is_cut)]
        parts.append((*pytree.tree_unflatten(own, spec), (end - begin) / rows))
    return parts
