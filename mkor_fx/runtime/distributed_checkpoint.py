"""What ``torch.distributed.checkpoint`` has saved, read without knowing beforehand what that is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from torch import Tensor

#: where something was in what was saved: keys of dicts, and numbers in lists
Place = tuple[Any, ...]


def read_entry(path: str | PathLike, entry: str, is_own: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors that were saved under ``{entry: {key: tensor}}``: of that, those whose key ``is_own``.

    Raises:
        ValueError: there is no such entry; names those that there are.
    """
    places, stored = _metadata(path)
    wanted = [key for key, place in places.items() if place[0] == entry and is_own(str(place[1]))]
    if not wanted:
        held = sorted({str(place[0]) for place in places.values()})
        raise ValueError(f"{path} holds no {entry!r}; it has {', '.join(held[:6]) or 'nothing'}")
    found = _read(path, wanted, stored)
    return {str(places[key][1]): found[key] for key in wanted}


def read_all(path: str | PathLike) -> dict[str, Any]:
    """Everything, in the nested dicts and lists that it was saved in; the keys of dicts are strings.

    Raises:
        ValueError: there is no checkpoint that can be read; says why.
    """
    places, stored = _metadata(path)
    nested: dict[str, Any] = {}
    for key, value in _read(path, list(stored), stored).items():
        at: Any = nested
        for part, following in pairwise(places[key]):
            at = _child(at, part, [] if isinstance(following, int) else {})
        _child(at, places[key][-1], value)
    return nested


def _child(container: Any, part: Any, fresh: Any) -> Any:
    """What is at ``part`` of a dict or a list, which becomes ``fresh`` where there is nothing."""
    if isinstance(container, list):
        container.extend([None] * (part + 1 - len(container)))
        if container[part] is None:
            container[part] = fresh
        return container[part]
    return container.setdefault(part, fresh)


def _metadata(path: str | PathLike) -> tuple[dict[str, Place], dict[str, Any]]:
    """By key: where it was in what was saved, and how it is stored."""
    from torch.distributed import checkpoint

    try:
        metadata = checkpoint.FileSystemReader(path).read_metadata()
        return metadata.planner_data or {}, metadata.state_dict_metadata
    except Exception as error:
        raise _unreadable(path, error) from error


def _read(path: str | PathLike, keys: Sequence[str], stored: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.api import CheckpointException

    state: dict[str, Any] = {}
    for key in keys:
        about = stored[key]
        tensor = isinstance(about, checkpoint.metadata.TensorStorageMetadata)
        state[key] = torch.empty(about.size, dtype=about.properties.dtype) if tensor else None
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(path), planner=planner)
    except CheckpointException as error:  # no Exception
        cause = next((failure[0] for failure in error.failures.values()), error)
        raise _unreadable(path, cause) from error
    return state


def _unreadable(path: str | PathLike, error: BaseException) -> ValueError:
    first = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"{path} is no folder that torch.distributed.checkpoint has written, or one that is incomplete: "
        f"{type(error).__name__}: "
        f"{first}. What torch.save has written is for load_state_dict(torch.load(...))"
    )
