"""Each weight's factors on one rank of a row: its gradient goes to its owner, its direction comes back."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from ...ir import StepGraph
from ..order.collectives import Message, Network
from ..order.compression import Compression, pack, unpack
from ..torch_api.tracing import insert
from .placement import Chunk, Part, lay_out


class Delivery:
    """Writes what carries gradients to owners and directions back: a reduce-scatter and an all-gather for each bucket,
    between them a sum over the ``column`` of an owner where there are others that own the same.

    ``owners`` are places in the ``row`` by name of weight (None: on every rank); a bias goes with its weight. Gradients of
    one dtype and device are a stream for each owner, in the order in which the backward makes them. Whatever the grid,
    that is the volume of an all-reduce: with C ranks in a row and W in a column, ``2 (C-1) / C + 2 (W-1) / (W C) = 2 (1
    - 1 / (W C))``.

    Gradients of weights ``apart`` are summed on every rank, as those without an owner, and their directions are
    broadcast, each by its owner.
    """

    def __init__(
        self,
        step: StepGraph,
        row: Network,
        column: Network | None,
        owners: Mapping[str, int | None],
        apart: Collection[str] = (),
    ) -> None:
        self.step, self.row, self.column = step, row, column
        #: by input position, of gradients that go to their owner, and of those that do not
        self.owner: dict[int, int] = {}
        self.apart: dict[int, int] = {}
        for index, site in step.sites.items():
            owner = owners[site.parameter.name]
            if owner is not None:
                biases = [site.bias.index] if site.bias is not None else []
                held = self.apart if site.parameter.name in apart else self.owner
                held |= dict.fromkeys([index, *biases], owner)
        position = {node: i for i, node in enumerate(step.graph.nodes)}
        streams: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index in sorted(self.owner, key=lambda i: (position[self._gradient(i)], i)):
            value = self._gradient(index).meta["val"]
            streams.setdefault((value.dtype, value.device), []).append(index)
        self.chunks: list[tuple[Chunk, torch.dtype, torch.device]] = []
        for (dtype, device), indices in streams.items():
            tensors = [(i, self._gradient(i).meta["val"].numel(), self.owner[i]) for i in indices]
            length = max(1, row.buckets.gradients // (dtype.itemsize * row.size))
            self.chunks += [(chunk, dtype, device) for chunk in lay_out(tensors, row.size, length)]
        self._received: list[fx.Node] = []

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {dtype for _, dtype, _ in self.chunks}

    def _gradient(self, index: int) -> fx.Node:
        grad = self.step.parameters[index].grad
        assert grad is not None
        return grad

    def to_owners(self, gradients: Mapping[int, fx.Node]) -> dict[int, fx.Node]:
        """This rank's own weights' ``gradients``, of all ranks together, by input position."""
        pieces: dict[int, list[tuple[fx.Node, int, int]]] = {}
        with self.step.graph.inserting_before(self.step.output):
            for chunk, dtype, device in self.chunks:
                parts = [_sources(gradients, rank) for rank in chunk.parts]
                flat = insert(self.step.graph, _padded, parts, chunk.length, dtype, device, label="gradients to owners")
                received = self.row.scatter(flat, self._messages("gradient", chunk))
                if self.column is not None:
                    received = self.column.sum_of_parts(received, self._messages("column", chunk))
                self._received.append(received)
                for part, offset in chunk.place(self.row.rank):
                    pieces.setdefault(part.key, []).append((self._received[-1], offset, offset + _size(part)))
            return self._restored(pieces)

    def from_owners(self, directions: Mapping[int, fx.Node], clock: fx.Node | None) -> dict[int, fx.Node]:
        """All directions, from this rank's own ones, by input position. ``clock`` is the step, where they are compressed."""
        pieces: dict[int, list[tuple[fx.Node, int, int]]] = {}
        with self.step.graph.inserting_before(self.step.output):
            for (chunk, dtype, _), received in zip(self.chunks, self._received):
                gathered = self._gathered(chunk, dtype, received, directions, clock)
                for rank, (node, start) in enumerate(gathered):
                    for part, offset in chunk.place(rank):
                        at = start + offset
                        pieces.setdefault(part.key, []).append((node, at, at + _size(part)))
            return self._restored(pieces) | self._broadcast(directions, clock)

    def _gathered(
        self, chunk: Chunk, dtype: torch.dtype, received: fx.Node, directions: Mapping[int, fx.Node], clock: fx.Node | None
    ) -> list[tuple[fx.Node, int]]:
        """Where the directions of each rank's parts of a chunk begin."""
        own, messages = chunk.parts[self.row.rank], self._messages("direction", chunk)
        parts, how = _sources(directions, own), self.row.buckets.compress
        if how is None or clock is None:
            filled = sum(map(_size, own))
            parts += [(received, filled, chunk.length)] if filled < chunk.length else []
            flat = insert(self.step.graph, _joined, parts, dtype, label="directions from owners")
            whole = self.row.gather(flat, messages)
            return [(whole, rank * chunk.length) for rank in range(self.row.size)]
        slots = max(map(len, chunk.parts))
        sides = [side_of(self.step.parameters[part.key].name, part.start) for part in own]
        given = (parts, clock, sides, chunk.length, slots, dtype, how)
        whole = self.row.gather(insert(self.step.graph, _packed, *given, label="directions from owners"), messages)
        size, found = how.bytes(chunk.length, slots, dtype), []
        for rank, held in enumerate(chunk.parts):
            given = (whole, rank * size, (rank + 1) * size, [_size(part) for part in held], slots, dtype, how)
            found.append((insert(self.step.graph, _unpacked, *given, label="directions from owners") if held else whole, 0))
        return found

    def _broadcast(self, directions: Mapping[int, fx.Node], clock: fx.Node | None) -> dict[int, fx.Node]:
        found = {}
        for index, owner in self.apart.items():
            own = directions[index] if owner == self.row.rank else None
            name = self.step.parameters[index].name
            found[index] = from_owner(self.row, owner, own, self._gradient(index), clock, name)
        return found

    def _restored(self, pieces: dict[int, list[tuple[fx.Node, int, int]]]) -> dict[int, fx.Node]:
        shapes = {index: list(self._gradient(index).meta["val"].shape) for index in pieces}
        names = {index: self.step.parameters[index].name for index in pieces}
        return {i: insert(self.step.graph, _reshaped, pieces[i], shapes[i], label=names[i]) for i in pieces}

    def _messages(self, kind: str, chunk: Chunk) -> list[Message]:
        return [Message(kind, self.step.parameters[p.key].name, _size(p)) for rank in chunk.parts for p in rank]


def from_owner(
    network: Network, owner: int, direction: fx.Node | None, like: fx.Node, clock: fx.Node | None, name: str
) -> fx.Node:
    """The ``direction`` that one rank has, on all; it is shaped as ``like``, a copy of which is what others receive into.
    ``clock`` is the step, where it is compressed."""
    graph, how = network.graph, network.buckets.compress
    value = like.meta["val"]
    if how is None or clock is None:
        sent = like if direction is None else direction
        if sent.meta["val"].dtype != value.dtype:
            sent = insert(graph, torch.Tensor.to, sent, value.dtype, label=name)
        return network.copy_of(owner, sent, "direction", name)
    numel = value.numel()
    if direction is None:
        sent = insert(graph, _nothing, clock, how.bytes(numel, 1, value.dtype), label=name)
    else:
        parts = [(direction, 0, numel)]
        sent = insert(graph, _packed, parts, clock, [side_of(name, 0)], numel, 1, value.dtype, how, label=name)
    sent = network.copy_of(owner, sent, "direction", name)
    flat = insert(graph, _unpacked, sent, 0, how.bytes(numel, 1, value.dtype), [numel], 1, value.dtype, how, label=name)
    return insert(graph, torch.Tensor.reshape, flat, list(value.shape), label=name)


def side_of(name: str, start: int) -> int:
    """What tells apart the random numbers of parts of parameters, the same in every process."""
    return zlib.crc32(f"{name}:{start}".encode()) & 0x3FFFFFFF


def _size(part: Part) -> int:
    return part.stop - part.start


def _sources(tensors: Mapping[int, fx.Node], parts: Sequence[Part]) -> list[tuple[fx.Node, int, int]]:
    return [(tensors[part.key], part.start, part.stop) for part in parts]


def _joined(pieces: list[tuple[Tensor, int, int]], dtype: torch.dtype) -> Tensor:
    return torch.cat([x.reshape(-1)[start:stop].to(dtype) for x, start, stop in pieces])


def _packed(
    pieces: list[tuple[Tensor, int, int]],
    clock: Tensor,
    sides: list[int],
    length: int,
    slots: int,
    dtype: torch.dtype,
    how: Compression,
) -> Tensor:
    return pack([x.reshape(-1)[start:stop] for x, start, stop in pieces], clock, sides, length, slots, dtype, how)


def _unpacked(
    sent: Tensor, start: int, stop: int, counts: list[int], slots: int, dtype: torch.dtype, how: Compression
) -> Tensor:
    return unpack(sent[start:stop], counts, slots, dtype, how)


def _nothing(clock: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=clock.device)


def _reshaped(pieces: list[tuple[Tensor, int, int]], shape: list[int]) -> Tensor:
    return _joined(pieces, pieces[0][0].dtype).reshape(shape)


def _padded(
    ranks: list[list[tuple[Tensor, int, int]]], length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    parts = []
    for pieces in ranks:
        missing = length - sum(stop - start for _, start, stop in pieces)
        parts += [_joined(pieces, dtype)] if pieces else []
        parts += [torch.zeros(missing, dtype=dtype, device=device)] if missing else []
    return torch.cat(parts)
