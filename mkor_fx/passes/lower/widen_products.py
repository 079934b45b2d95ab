"""Products in half precision, on a processor that has no instructions for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ...hardware import multiplies
from ...ir import StepGraph, fake_value
from ..core import graph_pass
from ..torch_api.backend import eliminate_dead_code
from ..torch_api.tracing import insert
from .expand import between, lowering_table, take_place

aten = torch.ops.aten

PRODUCTS = (
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    *(aten.convolution.default, aten.convolution_backward.default),
)
HALVES = (torch.bfloat16, torch.float16)


@graph_pass(stage="lower")
def widen_products(step: StepGraph) -> None:
    """``mm(a, b)`` -> ``mm(a.float(), b.float()).bfloat16()`` where the processor would emulate the former, 20 to 30 times
    as slowly.

    A product of two halves is exact in float32, in which both sum: they differ in the order of the sum, by a rounding at
    most. Only for Inductor: what runs operator by operator equals torch's own bit for bit.
    """
    for target in PRODUCTS:
        for node in step.graph.find_nodes(op="call_function", target=target):
            dtype = _emulated(node)
            if dtype is not None:
                _widen(step.graph, node, dtype)
    eliminate_dead_code(step.graph)


def _emulated(node: fx.Node) -> torch.dtype | None:
    """The dtype of all operands, if the processor cannot multiply it."""
    values = [fake_value(operand) for operand in node.all_input_nodes]
    values = [value for value in values if isinstance(value, Tensor)]
    (device, dtype), *others = {(value.device, value.dtype) for value in values}
    emulated = not others and dtype in HALVES and device.type == "cpu" and not multiplies(device, dtype)
    return dtype if emulated else None


def _wide(target: Any, args: tuple, kwargs: dict, dtype: torch.dtype) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
    return pytree.tree_map_only(Tensor, lambda made: made.to(dtype), target(*args, **kwargs))


def _widen(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    before = node.prev
    with graph.inserting_before(node):
        new = insert(
            graph, _wide, node.target, node.args, node.kwargs, dtype,
            decompositions=lowering_table(inductor=True), label=node.meta.get("mkor_fx", ""),
        )  # fmt: skip
    take_place(node, between(before, node), new)
