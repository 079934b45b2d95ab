"""Statistics that one step sends and the next one uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..ir import Site, StepGraph
from ..prims import accumulation_dtype
from ..rules import Rule
from .collectives import Message, Network
from .rewrite import Layout, summary_shapes, update_site
from .trace import insert


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


def buffers_of(step: StepGraph, rule: Rule) -> tuple[Buffer, ...]:
    """All statistics of a graph's sites, one buffer for each dtype and device: they have a whole step to arrive."""
    vectors: dict[tuple[torch.dtype, torch.device], list[Vector]] = {}
    for index, site in step.sites.items():
        value, layout = site.parameter.node.meta["val"], Layout.of(site)
        for kind in site.kinds:
            summary = sum(shape.numel() for shape in summary_shapes(rule, layout.shape_of_use(kind)))
            vector = Vector(site.parameter.name, index, kind, (summary + 1) * (layout.members or 1))
            vectors.setdefault((accumulation_dtype(value.dtype), value.device), []).append(vector)
    return tuple(Buffer(dtype, device, tuple(group)) for (dtype, device), group in vectors.items())


def nothing(buffers: tuple[Buffer, ...], device: torch.device) -> list[Tensor]:
    """What a step reads that no step has sent to: no step was taken."""
    return [torch.zeros((), dtype=torch.bool, device=device), *(buffer.new() for buffer in buffers)]


def send(
    graph: fx.Graph, network: Network | None, buffers: tuple[Buffer, ...], statistics: Mapping[int, dict[int, fx.Node]]
) -> list[fx.Node]:
    """The buffers, summed over ranks but not waited for: nobody may read them, or copy them, before ``arrived``."""
    sent = []
    for buffer in buffers:
        nodes = [statistics[vector.index][vector.kind] for vector in buffer.vectors]
        flat = insert(graph, torch.cat, nodes, label="statistics for the next step")
        messages = [Message("statistics", vector.name, vector.numel) for vector in buffer.vectors]
        sent.append(flat if network is None else network.start_sum(flat, messages))
    return sent


def arrived(
    graph: fx.Graph, network: Network | None, buffers: tuple[Buffer, ...], inputs: list[fx.Node]
) -> dict[int, dict[int, fx.Node]]:
    """What the last step has sent, by input position and orientation."""
    statistics: dict[int, dict[int, fx.Node]] = {}
    for buffer, node in zip(buffers, inputs):
        flat = node if network is None else network.wait(node)
        parts = insert(graph, buffer.split, flat, label="statistics of the last step")
        for vector, part in zip(buffer.vectors, parts):
            statistics.setdefault(vector.index, {})[vector.kind] = part
    return statistics


@dataclass(frozen=True)
class Refresh:
    """What refreshing one weight outside of a compiled step needs."""

    layout: Layout
    shape: torch.Size
    bias: torch.Size | None

    @classmethod
    def of(cls, site: Site) -> Refresh:
        bias = None if site.bias is None else torch.Size(site.bias.shape)
        return cls(Layout.of(site), torch.Size(site.parameter.shape), bias)


def refresh_now(
    rule: Rule,
    refreshes: Mapping[str, Refresh],
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
        known = refreshes[name]
        device = next(iter(state.values())).device
        grad = torch.zeros(known.shape, device=device)  # not read
        bias = None if known.bias is None else torch.zeros(known.bias, device=device)
        count = torch.tensor(step, device=device)
        new[name] = update_site(rule, known.layout, True, grad, bias, statistics[name], state, count)[2]
    return new
