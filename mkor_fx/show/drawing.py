"""A picture of one weight's neighbourhood in a graph, drawn by Graphviz."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from .recorder import Recording, Stage, target_name

#: fill colours by what a node is
COLOURS = {
    "product": "#ffd9a0",
    "operand": "#e4e9f0",
    "statistics": "#cfe8cf",
    "update": "#cfe0f7",
    "reader": "#ffffff",
}


def write_svg(path: str | os.PathLike[str], name: str, programs: Sequence[Recording]) -> None:
    """Draw the weight ``name`` in every one of ``programs`` that works on it.

    Raises:
        ValueError: no program knows the weight, or Graphviz is not installed.
    """
    source = neighbourhood(name, programs)
    command = shutil.which("dot")
    if command is None:
        raise ValueError(
            "drawing needs Graphviz' dot, which is not on the PATH; on Debian and Ubuntu: apt-get install graphviz"
        )
    subprocess.run([command, "-Tsvg", "-o", os.fspath(path)], input=source.encode(), check=True)


def neighbourhood(name: str, programs: Sequence[Recording]) -> str:
    """Graphviz source of what makes and uses the gradient of ``name``: a cluster for each program."""
    clusters = [drawn for i, program in enumerate(programs) if (drawn := _cluster(name, program, f"p{i}"))]
    if not clusters:
        known = sorted({weight for program in programs for weight in program.products})
        raise ValueError(
            f"{name!r} is no preconditioned weight of these programs. Weights: {', '.join(known[:8]) or 'none'}"
            f"{', ...' if len(known) > 8 else ''}"
        )
    look = 'node [shape=box style="filled,rounded" fontname="Helvetica" fontsize=10 color="#8a94a3"]'
    edges = 'edge [color="#8a94a3" arrowsize=0.6]'
    return f'digraph {{ rankdir=TB; fontname="Helvetica"; {look}; {edges};\n' + "\n".join(clusters) + "\n}\n"


def _cluster(name: str, program: Recording, prefix: str) -> str:
    kinds = _kinds(name, program)
    if not kinds:
        return ""
    shown = {node: _identity(node, kind) for node, kind in kinds.items() if not _is_plumbing(node, kind)}
    nodes = {f"{prefix}_{shown[n]} {_attributes(n, kinds[n], program)};" for n in shown}
    links = {f"{prefix}_{shown[a]} -> {prefix}_{shown[n]};" for n in shown for a in _sources(n, kinds, shown)}
    body = "\n  ".join([f'label={_quoted(program.title)}; color="#c5ccd6";', *sorted(nodes), *sorted(links)])
    return f"subgraph cluster_{prefix} {{\n  {body}\n}}"


def _identity(node: fx.Node, kind: str) -> str:
    """Readers are drawn as one node for each part of the step that they belong to."""
    label = node.meta.get("mkor_fx", "") if kind == "reader" else ""
    return "reader_" + re.sub(r"\W", "_", label) if label else node.name


def _is_plumbing(node: fx.Node, kind: str) -> bool:
    """Views and unpackings inside the update only lead from one node to the next."""
    view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return kind in ("statistics", "update") and (view or target_name(node) == "getitem")


def _sources(node: fx.Node, kinds: dict[fx.Node, str], shown: dict[fx.Node, str]) -> Iterator[fx.Node]:
    for arg in node.all_input_nodes:
        if arg in shown:
            yield arg
        elif arg in kinds:
            yield from _sources(arg, kinds, shown)


def _kinds(name: str, program: Recording) -> dict[fx.Node, str]:
    """The nodes to draw and what each is."""
    stage = _stage(program)
    products = program.products.get(name, [])
    kinds: dict[fx.Node, str] = {}
    for node in stage.graph.nodes:
        label = node.meta.get("mkor_fx", "")
        if node.name in products:
            kinds[node] = "product"
        elif label.startswith(f"{name}: "):
            kinds[node] = "statistics" if label.endswith("statistics") else "update"
    core = list(kinds)
    for node in core:
        for arg in node.all_input_nodes:
            kinds.setdefault(arg, "operand")
    own = {"product", "update"}
    for node in core:
        for user in node.users if kinds[node] in own else ():
            if user.op != "output":
                kinds.setdefault(user, "reader")
    return kinds


def _stage(program: Recording) -> Stage:
    return program["rewrite" if "rewrite" in program.stages else "match"]


def _attributes(node: fx.Node, kind: str, program: Recording) -> str:
    if kind == "reader" and (label := node.meta.get("mkor_fx")):
        return f'[label={_quoted(label)} fillcolor="{COLOURS[kind]}"]'
    value = node.meta.get("val")
    shape = f"\n{list(value.shape)}" if isinstance(value, Tensor) else ""
    title = program.parameters.get(node.name, node.name)
    operation = "" if node.op == "placeholder" else "\n" + target_name(node)
    return f'[label={_quoted(title + operation + shape)} fillcolor="{COLOURS[kind]}"]'


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
