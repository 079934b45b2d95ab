"""Many small collectives into few large ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir import StepGraph
from ..core import graph_pass
from ..match.find_sites import downstream
from ..torch_api.backend import eliminate_dead_code
from ..torch_api.tracing import insert
from .collectives import Group, Message, Sizes, c10d, copy_of_rank, divides, is_wait, starts, sum_over_ranks, wait_of
from .dependencies import readiness, sort_by_dependencies
from .fusion import Arrival, arrivals, fuse, product_seconds

aten = torch.ops.aten


@dataclass
class Parcel:
    """A tensor to be sent, part ``at`` of what the collective ``start`` carried."""

    node: fx.Node
    start: fx.Node
    at: int
    message: Message
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.node.meta["val"].numel() * self.dtype.itemsize


@dataclass
class Bucket:
    pieces: list[Parcel] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


@graph_pass(stage="schedule")
def bucket(step: StepGraph, *, group: Group) -> None:
    """Concatenate all-reduces and broadcasts in the order in which their operands get ready.

    Sums over fewer ranks than all stay as they are, and so do directions. Statistics, gradients and buffers travel
    apart, and what the forward has made does not wait for the backward: a statistics vector that is a ``cat`` is taken
    apart, so that the part about the layer's inputs leaves early. A tensor that fills a bucket by itself is sent as it
    is, and so is what another step waits for. Where speeds are known, statistics are in groups by these
    (:func:`~mkor_fx.passes.order.fusion.fuse`). The order depends on the graph alone.
    """
    graph, sizes = step.graph, group.buckets
    merged = (c10d.all_reduce.default, c10d.broadcast.default)
    over_all = [s for s in starts(graph) if s.target in merged and _group_of(s) == group.name]
    collectives = [s for s in over_all if all(map(is_wait, s.users)) and not divides(s)]
    if not collectives:
        return
    ready, position = readiness(graph), {node: i for i, node in enumerate(graph.nodes)}
    passed = None if sizes.speeds is None else product_seconds(graph, sizes.speeds)
    pieces = [piece for start in collectives for piece in _pieces(graph, start, sizes)]
    backward = downstream(step.seeds)
    for node in graph.nodes:  # those that _pieces has made
        ready.setdefault(node, max((ready[arg] for arg in node.all_input_nodes), default=0))
    pieces.sort(key=lambda p: (ready[p.node], position[p.start], p.at))
    kind_of = lambda piece: _kind(piece, backward)
    full: list[Bucket] = []
    if sizes.speeds is not None and passed is not None:
        timed = [piece for piece in pieces if piece.message.kind == "statistics"]
        there = arrivals([p.node for p in timed], [passed[ready[p.node]] for p in timed], sizes.speeds)
        groups = fuse([Arrival(at, p.bytes, kind_of(p)) for at, p in zip(there, timed, strict=True)], sizes.speeds)
        full += [Bucket([timed[at] for at in group]) for group in groups]
        pieces = [piece for piece in pieces if piece.message.kind != "statistics"]
    _write(graph, [*full, *_filled(pieces, sizes, kind_of)])
    sort_by_dependencies(graph)
    eliminate_dead_code(graph)


def _kind(piece: Parcel, backward: Collection[fx.Node]) -> tuple:
    """What only pieces that have it in common may share a bucket by."""
    together = "statistics" if piece.message.kind == "loss" else piece.message.kind
    return (piece.start.target, together, piece.dtype, piece.node.meta["val"].device, piece.node in backward)


def _filled(pieces: Sequence[Parcel], sizes: Sizes, kind_of: Callable[[Parcel], tuple]) -> list[Bucket]:
    """Buckets in the order in which they are full, by bytes; last those that are not."""
    full: list[Bucket] = []
    filling: dict[tuple, Bucket] = {}
    for piece in pieces:
        kind = piece.message.kind
        limit = sizes.gradients if kind == "gradient" else sizes.statistics
        if piece.bytes >= limit or kind in ("rows", "norms", "squares", "products"):
            full.append(Bucket([piece]))
            continue
        current = filling.setdefault(kind_of(piece), Bucket())
        current.pieces.append(piece)
        if current.bytes >= limit:
            full.append(filling.pop(kind_of(piece)))
    return [*full, *filling.values()]


def _pieces(graph: fx.Graph, start: fx.Node, sizes: Sizes) -> list[Parcel]:
    (message,) = start.meta["mkor_messages"]
    nodes = _parts(graph, start.args[0]) if message.kind == "statistics" else [start.args[0]]
    pieces = []
    for at, node in enumerate(nodes):
        value = node.meta["val"]
        narrow = sizes.dtype is not None and len(nodes) > 1 and value.numel() > 1
        dtype = sizes.dtype if narrow else value.dtype  # counts and noise levels do not fit into half precision
        pieces.append(Parcel(node, start, at, Message(message.kind, message.name, value.numel()), dtype))
    return pieces


def _parts(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """What a flat vector is concatenated of: ``cat([x, y])`` -> ``[x, y]``, sums of such vectors part by part."""
    shape = node.meta["val"].shape
    while node.target in (aten.clone.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        if node.args[0].meta["val"].shape != shape:
            break
        node = node.args[0]
    if node.target is aten.cat.default:
        return list(node.args[0])
    if node.target is aten.add.Tensor and len(node.all_input_nodes) == 2 and not node.kwargs:
        one, other = (_parts(graph, arg) for arg in node.args)
        lengths = [[part.meta["val"].numel() for part in parts] for parts in (one, other)]
        if lengths[0] == lengths[1] and len(one) > 1:
            with graph.inserting_after(node):
                label = node.meta.get("mkor_fx", "")
                return [insert(graph, torch.add, x, y, label=label) for x, y in zip(one, other)]
    return [node]


def _concatenated(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def _split(flat: Tensor, sizes: list[int], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [part.to(dtype) for part, dtype in zip(flat.split(sizes), dtypes)]


def _write(graph: fx.Graph, buckets: list[Bucket]) -> None:
    arrived: dict[fx.Node, dict[int, fx.Node]] = {}
    with graph.inserting_before(graph.output_node()):
        for one in buckets:
            first, nodes = one.pieces[0], [piece.node for piece in one.pieces]
            label = f"bucket of {len(nodes)}: {first.message.kind} over ranks"
            reduces = first.start.target is c10d.all_reduce.default
            flat = insert(graph, _concatenated, nodes, first.dtype, label=label) if len(nodes) > 1 else nodes[0]
            if flat.meta["val"].dtype != first.dtype:
                flat = insert(graph, torch.Tensor.to, flat, first.dtype, label=label)
            collective, rest = (sum_over_ranks, ()) if reduces else (copy_of_rank, (first.start.args[1],))
            start, done = insert(graph, collective, flat, *rest, _group_of(first.start), label=label)
            start.meta["mkor_messages"] = [piece.message for piece in one.pieces]
            values = [node.meta["val"] for node in nodes]
            parts = insert(graph, _split, done, [v.numel() for v in values], [v.dtype for v in values], label=label)
            for piece, part in zip(one.pieces, parts):
                arrived.setdefault(piece.start, {})[piece.at] = part
        for start, parts in arrived.items():
            whole = [parts[at] for at in sorted(parts)]
            result = whole[0] if len(whole) == 1 else insert(graph, torch.cat, whole, label=start.meta["mkor_fx"])
            wait_of(start).replace_all_uses_with(result)
    for start in arrived:
        graph.erase_node(wait_of(start))
        graph.erase_node(start)


def _group_of(start: fx.Node) -> str:
    return start.args[-1]
