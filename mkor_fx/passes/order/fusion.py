"""Which statistics travel together, by how long messages take (SPD-KFAC, Shi, Zhang and Li, 2021, arXiv 2107.06533)."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

from torch import fx

from ...runtime.speeds import Speeds
from .dependencies import is_written
from .estimate import flops_of


class Arrival(NamedTuple):
    """A tensor to be summed: ``ready``, seconds after the step began; its ``bytes``. Those of another ``kind`` (a
    dtype, say) cannot join it."""

    ready: float
    bytes: int
    kind: Hashable = None


def fuse(parcels: Sequence[Arrival], speeds: Speeds) -> list[list[int]]:
    """Positions of ``parcels``, which are in the order in which they get ready, in groups that are sent as one.

    One all-reduce at a time: ``start_0 = ready_0``, ``start_l = max(start_{l-1} + c_{l-1}, ready_l)`` with ``c = latency +
    bytes / bandwidth``. A group takes in the next parcel iff ``ready_{l+1} < start_l + latency``: that is there before the
    group's start-up is over, so that to wait for it costs less than a start-up of its own. The group then has the bytes
    of both and starts anew at the earliest when the new one is ready.
    """
    groups: list[list[int]] = []
    start = size = free = 0.0
    for at, parcel in enumerate(parcels):
        joins = groups and parcel.kind == parcels[groups[-1][-1]].kind and parcel.ready < start + speeds.latency
        if joins:
            groups[-1].append(at)
            size += parcel.bytes
        else:
            free = start + speeds.all_reduce(size) if groups else 0.0
            groups.append([at])
            size = parcel.bytes
        start = max(free, parcel.ready)
    return groups


def product_seconds(graph: fx.Graph, speeds: Speeds) -> list[float]:
    """How long the captured program's products take, up to each node and with it, by its place: the same on every rank."""
    passed, found = 0.0, []
    for node in graph.nodes:
        passed += 0 if is_written(node) else flops_of(node) / speeds.flops
        found.append(passed)
    return found


def arrivals(parts: Sequence[fx.Node], captured: Sequence[float], speeds: Speeds) -> list[float]:
    """When each of ``parts``, in the order in which they get ready, is there: ``captured`` seconds and those of the
    products that make the parts themselves, one after the other."""
    own, made, found = set[fx.Node](), 0.0, []
    for part, passed in zip(parts, captured, strict=True):
        made += sum(map(flops_of, _written_for(part, own))) / speeds.flops
        found.append(passed + made)
    return found


def _written_for(part: fx.Node, known: set[fx.Node]) -> Collection[fx.Node]:
    """What the library has written to make a part, and not for one before it."""
    new, rest = set[fx.Node](), [part]
    while rest:
        node = rest.pop()
        if is_written(node) and node not in known:
            known.add(node)
            new.add(node)
            rest += node.all_input_nodes
    return new
