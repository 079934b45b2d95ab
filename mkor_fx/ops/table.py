"""The op table itself: what a row is, and how one is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..ir import Decline, Tap

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """``read`` turns a node of this op into a tap; ``output`` is which of its results is the weight's gradient."""

    name: str
    read: Callable[[fx.Node], Tap | Decline]
    output: int | None
    covers: str
    examples: tuple[Callable[[], tuple[nn.Module, tuple]], ...]


#: name of an operator -> row
TABLE: dict[str, Row] = {}

#: these change a gradient's dtype or memory only, and these its shape but not the order of its elements
CASTS = {
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    torch.ops.prims.convert_element_type.default,
}
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}


def op_rule(
    op: torch._ops.OpOverload | str, *, output: int | None = None, covers: str = "", examples: tuple[Callable, ...] = ()
) -> Callable[[Callable], Callable]:
    """Add the decorated ``read(node) -> Tap | Decline`` to the table as the row of ``op``.

    Args:
        op: an operator, or its name (``"library.op.default"``) where it may not be loaded yet.
        output: which of the operator's results is the weight's gradient, None for an operator with one.
        covers: what people write that ends in this operator; for the documentation.
        examples: functions that make ``(layer, (input, ...))``; the row is tested on each.
    """

    def register(read: Callable) -> Callable:
        TABLE[str(op)] = Row(read.__name__, read, output, covers, tuple(examples))
        return read

    return register


class Weight(nn.Module):
    """A bare weight and what is done with it, for examples."""

    def __init__(self, shape: tuple[int, ...], function: Callable) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, self.weight)


def behind(node: fx.Node, targets: set) -> fx.Node:
    """The node behind a chain of one-input ops."""
    while node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node
