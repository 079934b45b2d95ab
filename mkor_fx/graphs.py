"""Every stage's graph, kept to be looked at: print, count, compare."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass

import tabulate
from torch import Tensor, fx


@dataclass(frozen=True)
class Stage:
    """The graph after one stage of the pipeline and the seconds spent in it."""

    name: str
    module: fx.GraphModule
    seconds: float

    def print_readable(self, print_output: bool = True) -> str:
        """The graph as Python code, with shapes; also printed unless ``print_output=False``."""
        return self.module.print_readable(print_output=print_output)

    def op_counts(self) -> Counter[str]:
        """How often each operator occurs."""
        return Counter(str(node.target) for node in self.module.graph.nodes if node.op == "call_function")

    def inserted(self, name: str = "") -> str:
        """What the library has written, block by block: those whose label (``"fc.weight: statistics"``) holds ``name``."""
        lines, label = [], ""
        for node in self.module.graph.nodes:
            own = node.meta.get("mkor_fx", "")
            if node.op != "call_function" or not own or name not in own:
                continue
            if own != label:
                lines.append(f"# {own}")
                label = own
            value = node.meta["val"]
            shape = f"  # {list(value.shape)}" if isinstance(value, Tensor) else ""
            arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
            lines.append(f"{node.name} = {node.target}({arguments}){shape}".replace(".default(", "("))
        return "\n".join(lines)

    @property
    def nodes(self) -> int:
        return len(self.module.graph.nodes)


class Graphs:
    """The stages of one compiled program in order: ``graphs["rewrite"]``, ``graphs.diff("match", "rewrite")``."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.stages: dict[str, Stage] = {}

    def record(self, name: str, module: fx.GraphModule, seconds: float) -> None:
        copy = fx.Graph()
        output = copy.graph_copy(module.graph, {})
        copy.output(output)
        self.stages[name] = Stage(name, fx.GraphModule(module, copy, class_name=name), seconds)

    def __getitem__(self, name: str) -> Stage:
        if name not in self.stages:
            raise KeyError(f"no stage {name!r}; kept: {', '.join(self.stages) or 'none, the program has not run yet'}")
        return self.stages[name]

    def __iter__(self):
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
