"""Collectives in a graph: written one by one, read back as the list of what crosses the network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .trace import insert

c10d = torch.ops._c10d_functional
#: ops that start a collective over one tensor; what they return is valid behind ``wait_tensor`` alone
STARTS = (
    c10d.all_reduce.default,
    c10d.broadcast.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_gather_into_tensor.default,
)
WAIT = c10d.wait_tensor.default


@dataclass(frozen=True)
class Sizes:
    """Bytes at which a bucket is full, and the dtype in which statistics travel (None: as they are)."""

    statistics: int = 128 << 10
    gradients: int = 25 << 20
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Group:
    """A process group as graphs know it: its name, how many ranks it has, and the size of buckets."""

    name: str
    size: int
    buckets: Sizes


@dataclass(frozen=True)
class Message:
    """What one tensor in a collective is: ``kind`` is "statistics", "gradient", "loss", "rows" or "buffer"."""

    kind: str
    name: str
    numel: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.name} [{self.numel}]"


def is_start(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in STARTS


def is_wait(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is WAIT


def starts(graph: fx.Graph) -> list[fx.Node]:
    """The collectives of a graph in the order in which they are issued."""
    return [node for node in graph.nodes if is_start(node)]


def wait_of(start: fx.Node) -> fx.Node:
    (wait,) = start.users
    assert is_wait(wait), f"{start} is used by {wait}, which does not wait for it"
    return wait


def sum_over_ranks(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The collective and its result, shaped as ``x``. Backends want dense memory."""
    start = c10d.all_reduce(x.contiguous().reshape(-1), "sum", group)
    return start, c10d.wait_tensor(start).reshape(x.shape)


def copy_of_first_rank(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The collective and rank 0's ``x``."""
    start = c10d.broadcast(x.contiguous().reshape(-1), 0, group)
    return start, c10d.wait_tensor(start).reshape(x.shape)


class Network:
    """Writes collectives over one process group into a graph, at its insertion point."""

    def __init__(self, graph: fx.Graph, group: Group) -> None:
        self.graph, self.group, self.size = graph, group.name, group.size

    def sum(self, node: fx.Node, kind: str, name: str) -> fx.Node:
        """The sum of ``node`` over all ranks, bitwise the same on each."""
        return self._write(sum_over_ranks, node, kind, name)

    def of_first_rank(self, node: fx.Node, kind: str, name: str) -> fx.Node:
        return self._write(copy_of_first_rank, node, kind, name)

    def _write(self, collective, node: fx.Node, kind: str, name: str) -> fx.Node:
        start, result = insert(self.graph, collective, node, self.group, label=f"{name}: {kind} over ranks")
        start.meta["mkor_messages"] = [Message(kind, name, node.meta["val"].numel())]
        return result


def describe(graph: fx.Graph) -> list[str]:
    """A line for each collective in order: what it does, how much of what it carries, and for whom."""
    lines = []
    for start in starts(graph):
        value = start.args[0].meta["val"]
        messages = ", ".join(map(str, start.meta["mkor_messages"]))
        kind = str(start.target).removeprefix("_c10d_functional.").removesuffix(".default")
        lines.append(f"{kind} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}: {messages}")
    return lines
