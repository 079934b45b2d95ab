"""What is in flight between two steps: private to the compiled step, and waited for before anybody looks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .factors import FactorState

#: new factors, by key, from whether the step counts and its buffers
Settle = Callable[[list[Tensor]], dict[str, Tensor]]


class Late:
    """The last step's statistics: ``[whether the step was taken, *buffers]``, some still on their way.

    A pending sum is known by its memory, so the tensors are handed from one program to the next as they are.
    """

    def __init__(self, mkor: FactorState) -> None:
        self._mkor = mkor
        self._tensors: list[Tensor] = []
        self._layout: Any = None
        self._settle: Settle | None = None
        self._generation = -1
        mkor.newer = self.settled
        weakref.finalize(self, _arrive_whenever, self._tensors)

    def put(self, tensors: list[Tensor], layout: Any, settle: Settle) -> None:
        self.clear()
        self._tensors += tensors
        self._layout, self._settle, self._generation = layout, settle, self._mkor.generation

    def take(self, layout: Any, nothing: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors for a program that expects ``layout``; ``nothing()`` where there are none."""
        self._drop_outdated()
        if self._tensors and self._layout != layout:  # other weights: refreshed here, on all ranks alike
            factors = self._mkor.tensors()
            for key, tensor in self.settled().items():
                factors[key].copy_(tensor)
            self.clear()
        return list(self._tensors) or nothing()

    def clear(self) -> None:
        _arrive(self._tensors)
        self._tensors.clear()

    def settled(self) -> dict[str, Tensor]:
        """The factors as the next refresh will make them, by key; waits, and changes nothing."""
        self._drop_outdated()
        if not self._tensors:
            return {}
        _arrive(self._tensors)
        assert self._settle is not None
        with torch.no_grad():
            return self._settle(self._tensors)

    def _drop_outdated(self) -> None:
        if self._generation != self._mkor.generation:  # the factors were replaced since
            self.clear()


def _arrive_whenever(tensors: list[Tensor]) -> None:
    """As ``_arrive``, from a garbage collection that may come while something else is traced."""
    with _disable_current_modes():
        _arrive(tensors)


def _arrive(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        torch.ops._c10d_functional.wait_tensor(tensor)
