"""Statistics that one step sends and the next one uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir import StepGraph
from ...prims import accumulation_dtype
from ..match.layout import Layout
from .refresh import refresh_one
from .vectors import Numbers


class Vector(NamedTuple):
    """One statistics vector: of the weight ``name``, at input ``index``, used in the orientation ``kind``."""

    name: str
    index: int
    kind: int
    numel: int


@dataclass(frozen=True)
class Buffer:
    """Statistics vectors one behind the other: what is in flight between two steps."""

    dtype: torch.dtype
    device: torch.device
    vectors: tuple[Vector, ...]

    @property
    def numel(self) -> int:
        return sum(vector.numel for vector in self.vectors)

    def new(self) -> Tensor:
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def split(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split([vector.numel for vector in self.vectors]))


def buffers_of(step: StepGraph) -> tuple[Buffer, ...]:
    """All statistics of a graph's sites, one buffer for each dtype and device: they have a whole step to arrive."""
    vectors: dict[tuple[torch.dtype, torch.device], list[Vector]] = {}
    for index, site in step.sites.items():
        value, layout = site.parameter.node.meta["val"], Layout.of(site)
        for kind in site.kinds:
            vector = Vector(site.parameter.name, index, kind, layout.vector_size(kind))
            vectors.setdefault((accumulation_dtype(value.dtype), value.device), []).append(vector)
    return tuple(Buffer(dtype, device, tuple(group)) for (dtype, device), group in vectors.items())


def nothing(buffers: tuple[Buffer, ...], device: torch.device) -> list[Tensor]:
    """What a step reads that no step has sent to: no step was taken."""
    return [torch.zeros((), dtype=torch.bool, device=device), *(buffer.new() for buffer in buffers)]


def refresh_now(
    layouts: Mapping[str, Layout],
    numbers: Mapping[str, Numbers],
    buffers: tuple[Buffer, ...],
    tensors: list[Tensor],
    states: Mapping[str, dict[str, Tensor]],
    step: int,
) -> dict[str, dict[str, Tensor]]:
    """New states of the weights in ``states``, by name, from arrived buffers; nothing is changed."""
    statistics: dict[str, dict[int, Tensor]] = {}
    for buffer, flat in zip(buffers, tensors):
        for vector, part in zip(buffer.vectors, buffer.split(flat)):
            statistics.setdefault(vector.name, {})[vector.kind] = part
    new = {}
    for name, state in states.items():
        count = torch.tensor(step, device=next(iter(state.values())).device)
        new[name] = refresh_one(layouts[name], numbers[name], statistics[name], None, None, state, count)
    return new
