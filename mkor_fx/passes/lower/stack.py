"""Small matrices of several weights in one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, fx

from ...ir import fake_value
from ...prims import STACKED
from ..match.find_sites import downstream
from ..order.dependencies import reorder
from ..torch_api.tracing import insert

#: how many at most; the gradients of their weights wait for each other
LARGEST = 16


def stack(graph: fx.Graph) -> None:
    """``f(A), f(B), ...`` -> ``unbind(f(stack(A, B, ...)))`` for operators of small matrices that look alike, up to
    ``LARGEST`` at a time in the order of the program. A GPU takes as long for one as for all."""
    alike: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target in STACKED:
            value = fake_value(node.args[0])
            alike[node.target, value.shape, value.dtype, value.device].append(node)
    for nodes in alike.values():
        for at in range(0, len(nodes), LARGEST):
            if len(nodes[at : at + LARGEST]) > 1:
                _stack(graph, nodes[at : at + LARGEST])


def _together(function: Callable[[Tensor], Tensor], operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return function(torch.stack(list(operands))).unbind()


def _stack(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """At the place of the last; what needs one of them follows there, and keeps its order."""
    with graph.inserting_before(nodes[-1]):
        made = insert(graph, _together, nodes[0].target, [node.args[0] for node in nodes], label=nodes[0].meta["mkor_fx"])
    late = downstream(nodes)
    for node, new in zip(nodes, made, strict=True):
        node.replace_all_uses_with(new)
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = order[nodes[-1]]
    for node in nodes:
        del order[node]
        graph.erase_node(node)
    reorder(graph, {node: (max(i, last) if node in late else i, i) for node, i in order.items()})
