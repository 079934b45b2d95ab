"""Factors from files, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from typing import Any

import torch
from torch import Tensor


def read_checkpoint(path: str | PathLike, entry: str, own: Collection[str] | None) -> dict[str, Tensor]:
    """What ``torch.distributed.checkpoint`` has saved under ``{entry: ...}``: of that, ``own`` keys, or all."""
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(path)
    metadata = reader.read_metadata()
    state = {}
    for key, place in metadata.planner_data.items():
        if place[0] == entry and (own is None or place[1] in own):
            saved = metadata.state_dict_metadata[key]
            assert isinstance(saved, checkpoint.metadata.TensorStorageMetadata), key
            state[place[1]] = torch.empty(saved.size, dtype=saved.properties.dtype)
    if not state:
        held = sorted({place[0] for place in metadata.planner_data.values()})
        raise ValueError(f"{path} holds no {entry!r}; it has {some(held)}")
    checkpoint.load({entry: state}, storage_reader=reader)
    return state


def fits(factor: Tensor, param: Tensor) -> bool:
    """Whether a square factor can belong to a parameter: its side is one of a matrix view's, a bias column more or not."""
    splits = [param.shape[:k].numel() for k in range(param.dim() + 1)]
    sides = {side for rows in splits if rows for side in (rows, param.numel() // rows)}
    return factor.shape[0] == factor.shape[-1] and bool({factor.shape[0], factor.shape[0] - 1} & sides)


def check_keys_and_shapes(own: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"the state is another model's: missing {some(missing)}; unexpected {some(unexpected)}")
    wrong = [
        f"{key}: loaded {tuple(loaded[key].shape)}, here {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if loaded[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the state is another model's: {some(wrong)}")


def some(names: list[Any], most: int = 6) -> str:
    shown = ", ".join(map(str, names[:most])) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
