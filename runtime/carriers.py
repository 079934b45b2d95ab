"""Leaves whose gradients carry statistics out of compiled backward graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Carriers:
    """One leaf a parameter, seen by nobody else: autograd adds its gradient up over micro-batches, uses and graphs."""

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[nn.Parameter, dict[tuple[int, ...], Tensor]]] = {}

    def of(self, param: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The carrier of ``param``, on its device. Graphs that do not agree on its shape have one each."""
        leaves = self._of(param)
        if shape not in leaves or leaves[shape].device != param.device:
            leaves[shape] = torch.zeros(shape, dtype=dtype, device=param.device, requires_grad=True)
            self._leaves[id(param)] = (param, leaves)
        return leaves[shape]

    def gradient(self, param: nn.Parameter) -> Tensor | None:
        """The statistics that have arrived since ``clear``, or None."""
        return next((leaf.grad for leaf in self._of(param).values() if leaf.grad is not None), None)

    def total(self, param: nn.Parameter) -> Tensor:
        """As ``gradient``, zeros where nothing has arrived."""
        arrived = self.gradient(param)
        return torch.zeros_like(next(iter(self._of(param).values()))) if arrived is None else arrived

    def clear(self, param: nn.Parameter) -> None:
        for leaf in self._of(param).values():
            leaf.grad = None

    def _of(self, param: nn.Parameter) -> dict[tuple[int, ...], Tensor]:
        known, leaves = self._leaves.get(id(param), (None, {}))
        return leaves if known is param else {}


def before_backward(outputs: Any, action: Callable[[], None]) -> None:
    """Call ``action`` when the backward of the compiled function that made ``outputs`` begins."""
    for output in outputs if isinstance(outputs, (list, tuple)) else (outputs,):
        node = _compiled_backward(output)
        if node is not None:
            node.register_prehook(lambda _: action())
            return


def _compiled_backward(output: Any, depth: int = 4) -> Any:
    """AOTAutograd's node behind an output, a few views away at most."""
    nodes = [output.grad_fn] if isinstance(output, Tensor) and output.grad_fn is not None else []
    for _ in range(depth):
        for node in nodes:
            if "CompiledFunction" in type(node).__name__:
                return node
        nodes = [parent for node in nodes for parent, _ in node.next_functions if parent is not None]
    return None
