"""Sums of rows that are never made."""

from __future__ import annotations

from torch import fx

from ...ir import StepGraph
from ...ops import ROW_SUMS
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code
from ..torch_api.tracing import insert
from .expand import between


@graph_pass(stage="lower")
def shortcut_row_sums(step: StepGraph) -> None:
    """``column_sum(unfold_rows(x))`` -> ``patch_sum(x)``; ``column_sum(one_hot_rows(i))`` -> ``histogram(i)``; so are
    sketches of rows."""
    left = list(step.graph.nodes)
    while left:
        node = left.pop()
        rows = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(rows, fx.Node) and (shortcut := ROW_SUMS.get((node.target, rows.target))) is not None:
            before = node.prev
            with step.graph.inserting_before(node):
                args = *rows.args, *node.args[1:]
                replacement = insert(step.graph, shortcut, *args, label=node.meta.get("mkor_fx", ""))
            left += between(before, node)  # rows of rows
            node.replace_all_uses_with(replacement)
    eliminate_dead_code(step.graph)
