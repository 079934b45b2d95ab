"""Every stage's graph, kept to be looked at: print, count, compare."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import tabulate
import torch
from torch import Tensor, fx

from ..ir import StepGraph
from .dump import Dump


def node_text(node: fx.Node) -> str:
    """One line for a node: ``mm_3 = aten.mm(permute_2, view)  # [8, 16]``."""
    value = node.meta.get("val")
    shape = f"  # {list(value.shape)}" if isinstance(value, Tensor) else ""
    if node.op == "placeholder":
        return f"{node.name}: input{shape}"
    arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
    if node.op == "output":
        return f"return {arguments}"
    return f"{node.name} = {target_name(node)}({arguments}){shape}"


def target_name(node: fx.Node) -> str:
    """``aten.mm``, ``aten.sum.dim_IntList``, ``getitem``"""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def module_path(node: fx.Node) -> str:
    """The user's name of the module whose forward the node belongs to, ``"blocks.0.mlp"``; '' for the model itself."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack") or {}
    return re.sub(r"^L\['\w+'\]\.?", "", list(stack.values())[-1][0]) if stack else ""


class Kept(NamedTuple):
    """A node as it was when its stage ended."""

    node: fx.Node
    op: str
    name: str
    target: Any
    args: tuple
    kwargs: dict[str, Any]
    meta: dict[str, Any]


class Stage:
    """The graph after one stage of the pipeline and the seconds spent in it.

    Passes go on to change the graph that they are given. What its nodes are is kept of it; a copy is made when somebody
    looks.
    """

    def __init__(self, name: str, module: fx.GraphModule, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._kept = [Kept(n, n.op, n.name, n.target, n.args, n.kwargs, dict(n.meta)) for n in module.graph.nodes]
        #: what the graph reads from its module
        self.constants = {row.target: attrgetter(row.target)(module) for row in self._kept if row.op == "get_attr"}
        self.nodes = len(self._kept)

    @functools.cached_property
    def graph(self) -> fx.Graph:
        copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node, op, name, target, args, kwargs, meta in self._kept:
            args, kwargs = fx.map_arg((args, kwargs), copies.__getitem__)  # type: ignore[assignment]
            copies[node] = copy.create_node(op, target, args, kwargs, name, node.type)
            copies[node].meta = meta
        self._kept.clear()
        return copy

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        """The graph with the ``constants`` that it reads, to call or interpret; its code is generated on first use."""
        return fx.GraphModule(self.constants, self.graph, class_name=self.name)

    def print_readable(self, print_output: bool = True) -> str:
        """The graph as Python code, with shapes; also printed unless ``print_output=False``."""
        return self.module.print_readable(print_output=print_output)

    def op_counts(self) -> Counter[str]:
        """How often each operator occurs."""
        return Counter(str(node.target) for node in self.graph.nodes if node.op == "call_function")

    def inserted(self, name: str = "") -> str:
        """What the library has written, block by block: those whose label (``"fc.weight: statistics"``) holds ``name``.

        Raises:
            KeyError: something was written, but nothing for ``name``; lists what there is.
        """
        lines, label = [], ""
        labels = dict.fromkeys(node.meta.get("mkor_fx") or "" for node in self.graph.nodes)
        if name and any(labels) and not any(name in known for known in labels):
            blocks = dict.fromkeys(known.partition(": ")[0] for known in labels if known)
            raise KeyError(f"nothing was written for {name!r}; there is {', '.join(blocks)}")
        for node in self.graph.nodes:
            own = node.meta.get("mkor_fx", "")
            if node.op != "call_function" or not own or name not in own:
                continue
            if own != label:
                lines.append(f"# {own}")
                label = own
            lines.append(node_text(node))
        return "\n".join(lines)


class Recording:
    """The stages of one compiled program in order: ``graphs["rewrite"]``, ``graphs.diff("match", "rewrite")``.

    ``parameters`` names the inputs that are trainable parameters, ``products`` the nodes that make each matched weight's
    gradient. ``code`` is what Inductor has generated, one text for each graph that it was given; empty without it.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.stages: dict[str, Stage] = {}
        self.parameters: dict[str, str] = {}
        self.products: dict[str, list[str]] = {}
        self.code: list[str] = []
        self.dump = Dump(title)

    def record(self, name: str, module: fx.GraphModule, seconds: float) -> None:
        self.stages[name] = Stage(name, module, seconds)

    def describe(self, step: StepGraph) -> None:
        """Take over what the matcher has found, by node names."""
        self.parameters = {p.node.name: p.name for p in step.parameters.values()}
        self.products = {site.parameter.name: [tap.node.name for tap in site.taps] for site in step.sites.values()}

    def __getitem__(self, name: str) -> Stage:
        if name not in self.stages:
            raise KeyError(f"no stage {name!r}; kept: {', '.join(self.stages) or 'none, the program has not run yet'}")
        return self.stages[name]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages.values())

    def op_counts(self, name: str) -> Counter[str]:
        """How often each operator occurs after stage ``name``."""
        return self[name].op_counts()

    def diff(self, before: str, after: str) -> str:
        """Unified diff of two stages' readable graphs."""
        old, new = (self[name].print_readable(print_output=False).splitlines() for name in (before, after))
        return "\n".join(difflib.unified_diff(old, new, before, after, lineterm=""))

    def __str__(self) -> str:
        rows, previous = [], 0
        for stage in self:
            rows.append([stage.name, stage.nodes, f"{stage.nodes - previous:+d}", f"{stage.seconds * 1e3:.1f}"])
            previous = stage.nodes
        return f"{self.title}\n" + tabulate.tabulate(
            rows, ["stage", "nodes", "change", "ms"], tablefmt="simple", disable_numparse=True
        )
