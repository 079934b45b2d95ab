"""What ``torch.distributed.checkpoint`` has saved, read without knowing beforehand what that is."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from os import PathLike
from typing import Any

import torch
from torch import Tensor


def read_entry(path: str | PathLike, entry: str, own: Collection[str] | None) -> dict[str, Tensor]:
    """The tensors that were saved under ``{entry: {key: tensor}}``: of that, ``own`` keys, or all.

    Raises:
        ValueError: there is no such entry; names those that there are.
    """
    places, stored = _metadata(path)
    wanted = [key for key, place in places.items() if place[0] == entry and (own is None or place[1] in own)]
    if not wanted:
        held = sorted({str(place[0]) for place in places.values()})
        raise ValueError(f"{path} holds no {entry!r}; it has {', '.join(held[:6]) or 'nothing'}")
    found = _read(path, wanted, stored)
    return {str(places[key][1]): found[key] for key in wanted}


def read_all(path: str | PathLike) -> dict[str, Any]:
    """Everything, in the nested dicts and lists that it was saved in; their keys are strings."""
    places, stored = _metadata(path)
    found = _read(path, list(stored), stored)
    nested: Any = {}
    for key, value in found.items():
        place, at = places[key], nested
        for part, following in zip(place, (*place[1:], None), strict=True):
            if isinstance(part, int):
                at.extend([None] * (part + 1 - len(at)))
            if following is None:
                at[part] = value
            else:
                if not (isinstance(part, int) or part in at) or (isinstance(part, int) and at[part] is None):
                    at[part] = [] if isinstance(following, int) else {}
                at = at[part]
    return nested


def _metadata(path: str | PathLike) -> tuple[dict[str, tuple], dict[str, Any]]:
    """By key: where it was in what was saved, and how it is stored."""
    from torch.distributed import checkpoint

    metadata = checkpoint.FileSystemReader(path).read_metadata()
    return metadata.planner_data or {}, metadata.state_dict_metadata


def _read(path: str | PathLike, keys: Collection[str], stored: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import DefaultLoadPlanner

    state: dict[str, Any] = {}
    for key in keys:
        about = stored[key]
        tensor = isinstance(about, checkpoint.metadata.TensorStorageMetadata)
        state[key] = torch.empty(about.size, dtype=about.properties.dtype) if tensor else None
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(path), planner=planner)
    return state
