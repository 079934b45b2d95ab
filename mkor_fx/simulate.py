"""What a compiled step would do on many GPUs, without one: its lanes of compute and communication, by estimate."""

from __future__ import annotations

import contextlib
import copy
import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import tabulate
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .api import compile_step
from .passes.collectives import is_start, is_wait
from .passes.estimate import nccl_milliseconds
from .passes.overlap import is_heavy
from .rules import MKOR, Rule


@dataclass(frozen=True)
class Device:
    """Peak multiply-add throughput by dtype, TFLOP/s, of which products are taken to reach 75 %, and memory TB/s."""

    tflops: dict[torch.dtype, float]
    bandwidth: float


#: dense peaks of the SXM version; float32 as TF32
DEVICES = {"h100": Device({torch.bfloat16: 989, torch.float16: 989, torch.float32: 494}, 3.35)}


@dataclass(frozen=True)
class Span:
    """A piece of work: ``lane`` is "compute", "communication" or "exposed" (compute waiting); times in ms."""

    lane: str
    name: str
    start: float
    length: float


@dataclass(frozen=True)
class Schedule:
    """A step's estimated timeline. All times are models of hardware, measured on none."""

    title: str
    spans: list[Span]

    def total(self, lane: str) -> float:
        """Milliseconds in a lane."""
        return sum(span.length for span in self.spans if span.lane == lane)

    @property
    def exposed(self) -> float:
        """Milliseconds for which compute waits for the network."""
        return self.total("exposed")

    @property
    def step(self) -> float:
        """Milliseconds from the first work to the last."""
        return max((span.start + span.length for span in self.spans), default=0.0)

    def __str__(self) -> str:
        rows = [[lane, f"{self.total(lane):.3f}"] for lane in ("compute", "communication", "exposed")]
        table = tabulate.tabulate([*rows, ["step", f"{self.step:.3f}"]], ("", "ms, estimated"), disable_numparse=True)
        return f"{self.title}\n{table}"

    def to_chrome(self, path: str | PathLike) -> None:
        """Write a trace for chrome://tracing or Perfetto."""
        lanes = {lane: i for i, lane in enumerate(("compute", "communication", "exposed"))}
        names = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": f"{lane} (estimated)"}}
                 for lane, i in lanes.items()]  # fmt: skip
        events = [
            {"ph": "X", "name": s.name, "pid": 0, "tid": lanes[s.lane], "ts": s.start * 1e3, "dur": s.length * 1e3}
            for s in self.spans
        ]
        with open(path, "w") as file:
            json.dump({"traceEvents": [*names, *events], "otherData": {"title": self.title}}, file)

    def to_html(self, path: str | PathLike, width: int = 1400) -> None:
        """Write the timeline as one page with a drawing; a rectangle's tooltip says what it is."""
        scale, lanes = width / max(self.step, 1e-9), ("compute", "communication", "exposed")
        colours = dict(zip(lanes, ("#4c78a8", "#72b7b2", "#d1495b")))
        drawn = [
            f'<rect x="{s.start * scale:.2f}" y="{10 + 50 * lanes.index(s.lane)}" width="{max(s.length * scale, 0.3):.2f}" '
            f'height="36" fill="{colours[s.lane]}"><title>{html.escape(f"{s.name}: {s.length * 1e3:.1f} us")}</title></rect>'
            for s in self.spans
        ]
        labels = [f'<text x="4" y="{60 + 50 * i}" font-size="11">{lane}</text>' for i, lane in enumerate(lanes)]
        with open(path, "w") as file:
            file.write(
                f"<!doctype html><meta charset=utf-8><title>{html.escape(self.title)}</title>"
                f"<pre>{html.escape(str(self))}</pre>"
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="170" font-family="sans-serif">'
                f"{''.join(drawn + labels)}</svg>"
            )


class _Built(Exception):
    """The step is compiled; it is not to run."""


def simulate(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    optimizer: Optimizer,
    *args: Any,
    rule: Rule | None = MKOR(),  # noqa: B008  (frozen)
    world_size: int = 64,
    device: str = "h100",
    **options: Any,
) -> Schedule:
    """The estimated timeline of a refresh step on one of ``world_size`` GPUs, eight a node; nothing is computed.

    ``args`` is one rank's batch; ``options`` are those of :func:`compile_step`. The step is traced on a fake process group
    and its collectives are scheduled as for a real one. A product takes its operations at 75 % of the peak or its bytes at
    full memory bandwidth, whichever is longer; other work its bytes, as if all of it that can be fused was; a collective
    what Inductor's model of NCCL says. Launches, other ranks' delays and contention are not in it.

    Raises:
        ValueError: an unknown device, or torch.distributed is initialised already.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r}: must be one of {', '.join(DEVICES)}")
    if dist.is_initialized():
        raise ValueError(
            "simulate makes a process group of its own: call it where torch.distributed is not initialised"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, optimizer = copy.deepcopy((model, optimizer))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        step = compile_step(model, loss_fn, optimizer, rule, **{**options, "backend": "eager"})

        def stop(*_: Any) -> None:
            raise _Built

        step.begin = stop  # type: ignore
        with contextlib.suppress(_Built):
            step(*args)
        graph = step.graphs["lower"].module.graph
    finally:
        dist.destroy_process_group()
    title = f"{type(model).__name__}: a step on one of {world_size} x {device}, estimated by an analytical model"
    return Schedule(title, timeline(graph, DEVICES[device], world_size))


def timeline(graph: fx.Graph, device: Device, world_size: int) -> list[Span]:
    """Play a graph in its order: work one after the other, collectives one after the other beside it."""
    now = free = 0.0
    arrives: dict[fx.Node, float] = {}
    spans: list[Span] = []
    for node in graph.nodes:
        if is_start(node):
            takes = nccl_milliseconds(_bytes(node), world_size, str(node.target))
            begin = max(now, free)
            arrives[node] = free = begin + takes
            name = ", ".join(str(message) for message in node.meta.get("mkor_messages", ())) or node.name
            spans.append(Span("communication", name, begin, takes))
        elif is_wait(node):
            late = arrives[node.args[0]] - now
            if late > 0:
                spans.append(Span("exposed", f"wait for {node.args[0].name}", now, late))
                now += late
        elif node.op == "call_function" and (takes := milliseconds(node, device)) > 0:
            spans.append(Span("compute", f"{node.name} {node.meta.get('mkor_fx', '')}".strip(), now, takes))
            now += takes
    return spans


def milliseconds(node: fx.Node, device: Device) -> float:
    """Estimated time of one node; what can be fused into its readers and producers costs what crosses their borders."""
    if is_heavy(node):
        moved = sum(map(_bytes, [node, *node.all_input_nodes]))
    else:
        read = [arg for arg in node.all_input_nodes if arg.op == "placeholder" or is_heavy(arg) or is_wait(arg)]
        stored = any(is_heavy(user) or is_start(user) or user.op == "output" for user in node.users)
        moved = sum(map(_bytes, read)) + (_bytes(node) if stored or node.target is torch.ops.aten.copy_.default else 0)
        if _is_view(node):
            return 0.0
    took = moved / device.bandwidth * 1e-9
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        flops = flop_registry[packet](*values[0], **values[1], out_val=node.meta["val"])
        dtype = tree_leaves(node.meta["val"])[0].dtype
        took = max(took, flops / (0.75 * device.tflops.get(dtype, device.tflops[torch.float32])) * 1e-9)
    return took


def _bytes(node: fx.Node) -> int:
    tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return sum(int(t.numel()) * t.element_size() for t in tensors)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return getattr(target, "is_view", False) or getattr(target, "__name__", "") == "getitem"
