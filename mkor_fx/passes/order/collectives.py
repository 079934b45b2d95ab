"""Collectives in a graph: written one by one, read back as the list of what crosses the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from ...runtime.speeds import Speeds
from ..torch_api.tracing import insert
from .compression import Compression

c10d = torch.ops._c10d_functional
#: ops that start a collective over one tensor; what they return is valid behind ``wait_tensor`` alone
STARTS = (
    c10d.all_reduce.default,
    c10d.broadcast.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_gather_into_tensor.default,
)
#: ops that give ranks different results, or take different things from them
DIVIDING = STARTS[2:]
WAIT = c10d.wait_tensor.default


@dataclass(frozen=True)
class Sizes:
    """Bytes at which a bucket is full, and the dtype in which statistics travel (None: as they are). Where ``speeds`` are
    known, they decide which statistics travel together. ``compress``: how directions of owners travel (None: as they
    are)."""

    statistics: int = 128 << 10
    gradients: int = 25 << 20
    dtype: torch.dtype | None = None
    speeds: Speeds | None = None
    compress: Compression | None = None


@dataclass(frozen=True)
class Group:
    """A process group as graphs know it: its name, how many ranks it has, the size of buckets, and which rank this is.

    Where weights have owners, ranks stand in a grid: those of a ``row`` keep all weights among them, each its own, and those
    of a ``column`` keep the same ones. A row of all ranks has columns of one, None.
    """

    name: str
    size: int
    buckets: Sizes
    rank: int = 0
    row: Group | None = None
    column: Group | None = None

    @property
    def place(self) -> int:
        """The place in its row: what a weight's owner is."""
        return self.rank if self.row is None else self.row.rank


@dataclass(frozen=True)
class Message:
    """What one tensor in a collective is.

    ``kind`` is "statistics", "gradient", "column" (gradients once more, over the ranks that keep the same weights),
    "direction", "norms", "squares", "products", "loss", "rows" or "buffer".
    """

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


def in_line(graph: fx.Graph, divided: bool = False) -> dict[fx.Node, fx.Node]:
    """Each collective's predecessor, in a graph that is not the same on all ranks, as is known or to be seen: there it must
    stay behind it.

    Where weights have owners, ranks compute different things from what they receive, and an order derived from the graph
    would be each rank's own.
    """
    issued = starts(graph)
    return {b: a for a, b in pairwise(issued)} if divided or any(map(divides, issued)) else {}


def divides(start: fx.Node) -> bool:
    """Whether ranks differ in what they compute around this collective."""
    messages = start.meta.get("mkor_messages")  # Inductor keeps none
    return start.target in DIVIDING or (messages is not None and messages[0].kind == "direction")


def wait_of(start: fx.Node) -> fx.Node:
    (wait,) = start.users
    assert is_wait(wait), f"{start} is used by {wait}, which does not wait for it"
    return wait


def sum_over_ranks(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The collective and its result, shaped as ``x``. Backends want dense memory."""
    start = c10d.all_reduce(x.contiguous().reshape(-1), "sum", group)
    return start, c10d.wait_tensor(start).reshape(x.shape)


def start_sum_over_ranks(x: Tensor, group: str) -> Tensor:
    return c10d.all_reduce(x, "sum", group)


def copy_of_rank(x: Tensor, rank: int, group: str) -> tuple[Tensor, Tensor]:
    """The collective and the ``x`` of one ``rank``."""
    start = c10d.broadcast(x.contiguous().reshape(-1), rank, group)
    return start, c10d.wait_tensor(start).reshape(x.shape)


def part_of_sum(x: Tensor, size: int, group: str) -> tuple[Tensor, Tensor]:
    """The collective and this rank's part, one of ``size`` in a row, of the sum of ``x`` over ranks."""
    start = c10d.reduce_scatter_tensor(x.contiguous(), "sum", size, group)
    return start, c10d.wait_tensor(start)


def all_parts(x: Tensor, size: int, group: str) -> tuple[Tensor, Tensor]:
    """The collective and all ranks' ``x`` in a row."""
    start = c10d.all_gather_into_tensor(x.contiguous(), size, group)
    return start, c10d.wait_tensor(start)


class Network:
    """Writes collectives over one process group into a graph, at its insertion point."""

    def __init__(self, graph: fx.Graph, group: Group) -> None:
        self.graph, self.group, self.size, self.rank = graph, group.name, group.size, group.rank
        self.grid, self.buckets = group, group.buckets

    def of(self, group: Group | None) -> Network | None:
        """Over other ranks, in the same graph."""
        return None if group is None else Network(self.graph, group)

    def sum(self, node: fx.Node, kind: str, name: str) -> fx.Node:
        """The sum of ``node`` over all ranks, bitwise the same on each."""
        return self._one(sum_over_ranks, node, kind, name)

    def copy_of(self, rank: int, node: fx.Node, kind: str, name: str) -> fx.Node:
        """What ``node`` is on one ``rank``."""
        return self._one(copy_of_rank, node, kind, name, rank)

    def scatter(self, node: fx.Node, messages: list[Message]) -> fx.Node:
        """This rank's part of the sum over ranks."""
        return self._write(part_of_sum, node, messages, self.size)

    def gather(self, node: fx.Node, messages: list[Message]) -> fx.Node:
        """All ranks' parts in a row."""
        return self._write(all_parts, node, messages, self.size)

    def sum_of_parts(self, node: fx.Node, messages: list[Message]) -> fx.Node:
        """The sum over these ranks of what is a part of a sum already."""
        return self._write(sum_over_ranks, node, messages)

    def start_sum(self, node: fx.Node, messages: list[Message]) -> fx.Node:
        """The sum over ranks, on its way: only ``wait`` may read it, in this graph or in another one."""
        start = insert(self.graph, start_sum_over_ranks, node, self.group, label="statistics over ranks")
        start.meta["mkor_messages"] = messages
        return start

    def wait(self, node: fx.Node) -> fx.Node:
        return insert(self.graph, WAIT, node, label="statistics over ranks")

    def _one(self, collective: Callable, node: fx.Node, kind: str, name: str, *args: int) -> fx.Node:
        return self._write(collective, node, [Message(kind, name, node.meta["val"].numel())], *args)

    def _write(self, collective: Callable, node: fx.Node, messages: list[Message], *args: int) -> fx.Node:
        name = messages[0].name + (f" to {messages[-1].name}" if len(messages) > 1 else "")
        label = f"{name}: {messages[0].kind} over ranks"
        start, result = insert(self.graph, collective, node, *args, self.group, label=label)
        start.meta["mkor_messages"] = messages
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
