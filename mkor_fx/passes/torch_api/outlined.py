"""A part of a program as a function of its own, which Inductor compiles once for all calls. One of the homes of torch's
private APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx


def call_outlined(subgraph: Any, written: Sequence[int], *operands: Any) -> None:
    """Runs ``subgraph`` on ``operands``, and writes to those at the positions ``written``; returns nothing.

    As the target of a node it stands for its own lowering: Inductor calls it with its own representation of the operands.
    """
    from torch._inductor import ir

    class Call(ir.InvokeSubgraph):
        """Torch's own call of a subgraph, which changes nothing, with what it writes declared."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            device = self.layout.device
            self.mutation_outputs = [
                ir.MutationOutput(ir.NoneLayout(device=device), self.inputs[at], self) for at in written
            ]

        def get_outputs(self) -> list:
            return [self, *self.mutation_outputs]

    plain, ir.InvokeSubgraph = ir.InvokeSubgraph, Call
    try:
        plain.create(subgraph, *operands)
    finally:
        ir.InvokeSubgraph = plain


call_outlined._inductor_lowering_function = True  # type: ignore[attr-defined]
fx.node.has_side_effect(call_outlined)
