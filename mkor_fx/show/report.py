"""The page that shows what the compiler did: ``report.html`` with everything it shows embedded as JSON."""

from __future__ import annotations

import linecache
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ir import source_frame, source_line
from .page import write_page
from .recorder import Recording, Stage, module_path, node_text

#: lines of the user's source shown above and below the one that a node comes from
CONTEXT = 3


class Table:
    """Distinct strings, numbered: most lines of a stage are those of the stage before."""

    def __init__(self) -> None:
        self.strings: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, string: str) -> int:
        if string not in self._numbers:
            self._numbers[string] = len(self.strings)
            self.strings.append(string)
        return self._numbers[string]


def write_report(
    path: str | os.PathLike[str], title: str, programs: Sequence[Recording], coverage: Any
) -> None:
    """Write one page about ``programs``, readable with no network: coverage, stages, diffs, source lines, generated code."""
    write_page(path, "report.html", report_data(title, programs, coverage))


def report_data(title: str, programs: Sequence[Recording], coverage: Any) -> dict[str, Any]:
    """What the page embeds. Nodes are numbers into ``texts``, ``labels`` and ``places``."""
    texts, labels, places = Table(), Table(), Table()
    frames: dict[str, set[tuple[str, int]]] = {}
    labels.number(""), places.number("")

    def stage_data(stage: Stage, parameters: dict[str, str]) -> dict[str, Any]:
        rows = [_node(node, parameters, frames) for node in stage.graph.nodes]
        return {
            "name": stage.name,
            "ms": stage.seconds * 1e3,
            "texts": [texts.number(text) for text, _, _ in rows],
            "labels": [labels.number(label) for _, label, _ in rows],
            "places": [places.number(place) for _, _, place in rows],
        }

    shown = [
        {"title": p.title, "stages": [stage_data(stage, p.parameters) for stage in p], "code": p.code} for p in programs
    ]
    return {
        "title": title,
        "torch": torch.__version__,
        "coverage": coverage.to_dict() if coverage is not None else None,
        "programs": shown,
        "texts": texts.strings,
        "labels": labels.strings,
        "places": places.strings,
        "snippets": {line: [_snippet(*frame) for frame in sorted(known)] for line, known in frames.items()},
    }


def _node(node: fx.Node, parameters: dict[str, str], frames: dict[str, set]) -> tuple[str, str, str]:
    """A node's line, the label of the block that it was written in, and where in the user's code it comes from."""
    text = node_text(node)
    if node.op == "placeholder" and node.name in parameters:
        text += f"  {parameters[node.name]}"
    place, frame = source_line(node), source_frame(node)
    if frame is not None:
        frames.setdefault(place, set()).add(frame)
    return text, node.meta.get("mkor_fx", ""), place or module_path(node)


def _snippet(path: str, line: int) -> dict[str, Any]:
    first = max(1, line - CONTEXT)
    lines = [linecache.getline(path, number).rstrip("\n") for number in range(first, line + CONTEXT + 1)]
    while lines and not lines[-1]:
        lines.pop()
    return {"path": path, "line": line, "first": first, "lines": lines}
