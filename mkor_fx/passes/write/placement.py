"""Which rank owns which weight, and how what owners receive is laid out. Everything here is the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...runtime.balance import deal


class Load(NamedTuple):
    """What owning one weight means: multiply-adds of its preconditioning, ``O I (O + I)`` a matrix; bytes of gradient."""

    work: int
    bytes: int


def assign(
    loads: Mapping[str, Load], size: int, padding: float, known: Mapping[str, int | None] | None = None
) -> dict[str, int | None]:
    """An owner among ``size`` ranks for each weight, or None: on every rank.

    Longest processing time first, on the larger of a rank's two shares: of all work and of all bytes. All ranks' parts are
    padded to the longest, so weights of the fullest rank stay on every rank, the largest first, until padding is no more
    than ``padding`` times all bytes. What is ``known`` keeps its owner.
    """
    known = dict(known or {})
    everywhere = {name for name, owner in known.items() if owner is None}
    total = Load(*(max(1, sum(load[i] for load in loads.values())) for i in range(2)))
    shares = {name: (load.work / total.work, load.bytes / total.bytes) for name, load in loads.items()}
    new = sorted((name for name in loads if name not in known), key=lambda name: -max(shares[name]))  # stable
    while True:
        owners = {name: owner for name, owner in known.items() if owner is not None}
        held = [[0.0, 0.0] for _ in range(size)]
        for name, owner in owners.items():
            held[owner] = [a + b for a, b in zip(held[owner], shares.get(name, (0, 0)))]
        for name in new:
            if name not in everywhere:
                after = [[a + b for a, b in zip(rank, shares[name])] for rank in held]
                owners[name] = min(range(size), key=lambda r: (max(after[r]), sum(after[r]), r))
                held[owners[name]] = after[owners[name]]
        sizes = [sum(loads[n].bytes for n, owner in owners.items() if owner == r and n in loads) for r in range(size)]
        fullest = sizes.index(max(sizes))
        movable = [name for name in new if owners.get(name) == fullest]
        if size * max(sizes) - sum(sizes) <= padding * total.bytes or not movable:
            return {**known, **{name: owners.get(name) for name in new}}
        everywhere.add(max(movable, key=lambda name: loads[name].bytes))


def assign_all(
    loads: Mapping[str, Load], size: int, padding: float, known: Mapping[str, int | None] | None = None
) -> dict[str, int | None]:
    """As :func:`assign`, with an owner for those weights as well that padding would keep on every rank: the one with
    the least work, the costliest first."""
    owners = assign(loads, size, padding, known)
    held = [sum(load.work for name, load in loads.items() if owners[name] == rank) for rank in range(size)]
    return owners | deal({name: load.work for name, load in loads.items() if owners[name] is None}, held)


def apart(loads: Mapping[str, Load], owners: Mapping[str, int], size: int, padding: float) -> set[str]:
    """Weights whose gradients had better be summed on every rank and whose directions their owners broadcast: as few as
    it takes, the largest of the fullest rank first, for padding to be no more than ``padding`` times all bytes."""
    found, total = set[str](), sum(load.bytes for load in loads.values())
    while True:
        own = [[n for n in loads if owners[n] == rank and n not in found] for rank in range(size)]
        sizes = [sum(loads[name].bytes for name in names) for names in own]
        fullest = own[sizes.index(max(sizes))]
        if size * max(sizes) - sum(sizes) <= padding * total or not fullest:
            return found
        found.add(max(fullest, key=lambda name: loads[name].bytes))


class Part(NamedTuple):
    """Elements ``start`` to ``stop`` of tensor ``key``, flat."""

    key: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """What one reduce-scatter carries: for each rank its ``parts`` one after another, padded to ``length`` elements."""

    length: int
    parts: tuple[tuple[Part, ...], ...]

    def place(self, rank: int) -> list[tuple[Part, int]]:
        """The parts of ``rank`` with their offsets in its ``length`` elements."""
        placed, offset = [], 0
        for part in self.parts[rank]:
            placed.append((part, offset))
            offset += part.stop - part.start
        return placed


def lay_out(tensors: Sequence[tuple[int, int, int]], size: int, length: int) -> list[Chunk]:
    """Chunks of at most ``length`` elements a rank for ``tensors``: ``(key, elements, owner)`` in the order of sending.

    The tensors of an owner are one stream that is cut wherever a chunk is full, so only the end of a stream is padded.
    """
    longest = max((sum(n for _, n, owner in tensors if owner == rank) for rank in range(size)), default=0)
    lengths = [min(length, longest - at) for at in range(0, longest, length)]
    cut: list[list[list[Part]]] = [[[] for _ in range(size)] for _ in lengths]
    filled = [0] * size
    for key, numel, owner in tensors:
        start = 0
        while start < numel:
            chunk = filled[owner] // length
            stop = min(numel, start + length - filled[owner] % length)
            cut[chunk][owner].append(Part(key, start, stop))
            filled[owner] += stop - start
            start = stop
    return [Chunk(n, tuple(map(tuple, parts))) for n, parts in zip(lengths, cut)]
