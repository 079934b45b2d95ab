"""Factors from files, and whether they fit."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint import StorageReader

    from .state import FactorState


def load_factors(mkor: FactorState, checkpoint: str | os.PathLike | StorageReader, key: str = "mkor") -> None:
    """Load what ``torch.distributed.checkpoint.save({key: step.mkor.state_dict(), ...})`` has saved.

    Any number of ranks may load it, in either placement, before or behind the first step; every rank must call this. Until
    the first step a rank holds all factors, and from then on those that it keeps.

    Raises:
        ValueError: the checkpoint has nothing under ``key``, or another model's factors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    entries = reader.read_metadata().state_dict_metadata
    prefix = f"{key}."
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not state:
        raise ValueError(f"the checkpoint has nothing under {key!r}. It has {some(sorted(entries))}")
    own = mkor.tensors()
    if own:
        state = {name: t for name, t in state.items() if name[len(prefix) :] in {*own, "step"}}
    dcp.load(state, storage_reader=reader)
    mkor.load_state_dict({name[len(prefix) :]: tensor for name, tensor in state.items()})


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
