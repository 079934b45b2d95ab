"""Leaves whose gradients carry statistics out of compiled backward graphs, and how it is known that they are a step's
own."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Mark(NamedTuple):
    """A gradient as the last backward has left it."""

    gradient: weakref.ref[Tensor]
    version: int


class Leaves:
    """The carriers of one parameter: graphs that do not agree on a shape have one each."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = weakref.ref(param)
        self.by_shape: dict[tuple[int, ...], Tensor] = {}
        self.mark: Mark | None = None
        #: of a rule that gathers: how often each of its slots has been written
        self.slots: Counter[int] = Counter()


class Carriers:
    """One leaf a parameter, seen by nobody else: autograd adds its gradient up over micro-batches, uses and graphs."""

    def __init__(self) -> None:
        self._leaves: dict[int, Leaves] = {}

    def of(self, param: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The carrier of ``param``, on its device."""
        leaves = self._of(param)
        if leaves is None:
            self._leaves = {key: known for key, known in self._leaves.items() if known.param() is not None}
            leaves = self._leaves[id(param)] = Leaves(param)
        held = leaves.by_shape
        known = held.get(shape)
        if known is None or (known.device, known.dtype) != (param.device, dtype):
            held[shape] = torch.zeros(shape, dtype=dtype, device=param.device, requires_grad=True)
            if known is not None and known.grad is not None:  # the model has moved with statistics that wait
                held[shape].grad = known.grad.to(param.device, dtype)
        return held[shape]

    def gradient(self, param: nn.Parameter) -> Tensor | None:
        """The statistics that have arrived since ``clear``, or None."""
        leaves = self._of(param)
        found = () if leaves is None else leaves.by_shape.values()
        return next((leaf.grad for leaf in found if leaf.grad is not None), None)

    def total(self, param: nn.Parameter) -> Tensor:
        """As ``gradient``, zeros where nothing has arrived."""
        arrived, leaves = self.gradient(param), self._of(param)
        assert leaves is not None
        return torch.zeros_like(next(iter(leaves.by_shape.values()))) if arrived is None else arrived

    def clear(self, param: nn.Parameter) -> None:
        leaves = self._of(param)
        for leaf in () if leaves is None else leaves.by_shape.values():
            leaf.grad = None
        if leaves is not None:
            leaves.slots.clear()

    def write(self, param: nn.Parameter, slot: int) -> None:
        """A backward that has begun writes into this slot."""
        leaves = self._of(param)
        assert leaves is not None
        leaves.slots[slot] += 1

    def written(self, param: nn.Parameter) -> Counter[int]:
        """How often each slot was written since ``clear``."""
        leaves = self._of(param)
        return Counter() if leaves is None else leaves.slots

    def _of(self, param: nn.Parameter) -> Leaves | None:
        leaves = self._leaves.get(id(param))
        return leaves if leaves is not None and leaves.param() is param else None

    # ---- whose step they belong to ------------------------------------------------------------------------------------

    def mark(self, params: Iterable[nn.Parameter]) -> None:
        """Remember the gradients that a backward has left: what is added to them later belongs to the same step."""
        for param in params:
            leaves = self._of(param)
            if leaves is not None:
                grad = param.grad
                leaves.mark = None if grad is None else Mark(weakref.ref(grad), grad._version)

    def begins(self, param: nn.Parameter) -> bool:
        """Whether the gradient is not the one that the last backward has left: it was cleared, or changed in place."""
        leaves, grad = self._of(param), param.grad
        if leaves is None or leaves.mark is None or grad is None:
            return True
        return leaves.mark.gradient() is not grad or leaves.mark.version != grad._version

    def restart(self, param: nn.Parameter) -> None:
        """Drop statistics whose gradient is gone: it is None, or was set to zero in place.

        The latter is decided on the device, and looked at only where the gradient has changed since the last backward. With
        slots, which are free again then, the host waits for that.
        """
        if self.gradient(param) is None or not self.begins(param):
            return
        if param.grad is None:
            return self.clear(param)
        grad = local(param.grad)
        if grad.numel():  # a rank may hold nothing of a sharded gradient
            leaves = self._of(param)
            assert leaves is not None
            accumulated = (grad != 0).any()
            if leaves.slots and not accumulated:
                return self.clear(param)
            for leaf in leaves.by_shape.values():
                if leaf.grad is not None:
                    leaf.grad = torch.where(accumulated, leaf.grad, torch.zeros_like(leaf.grad))
        return None


def local(grad: Tensor) -> Tensor:
    """The numbers of a gradient that are here: of a sharded one, and of a sparse one those that it holds."""
    from torch.distributed.tensor import DTensor

    if isinstance(grad, DTensor):
        grad = grad.to_local()
    return grad._values() if grad.is_sparse else grad


class Watch:
    """Calls ``begin`` when a backward of a compiled function begins, and ``end`` when the whole of it has ended."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.begin, self.end = begin, end

    def on(self, outputs: Any) -> None:
        """Watch the compiled function that has made ``outputs``."""
        for output in outputs if isinstance(outputs, (list, tuple)) else (outputs,):
            node = _compiled_backward(output)
            if node is not None:
                node.register_prehook(self._begins)
                return

    def _begins(self, gradients: Any) -> None:
        self.begin()
        # twice: what others have asked for at the end of this backward, DistributedDataParallel for one, goes first
        _at_the_end(lambda: _at_the_end(self.end))


def _at_the_end(action: Callable[[], None]) -> None:
    """Call ``action`` when the backward that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


def _compiled_backward(output: Any, depth: int = 4) -> Any:
    """AOTAutograd's node behind an output, a few views away at most."""
    nodes = [output.grad_fn] if isinstance(output, Tensor) and output.grad_fn is not None else []
    for _ in range(depth):
        for node in nodes:
            if "CompiledFunction" in type(node).__name__:
                return node
        nodes = [parent for node in nodes for parent, _ in node.next_functions if parent is not None]
    return None


