"""Numbers that change between steps, in one tensor on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class PackedNumbers:
    """``size`` numbers as one float64 tensor, copied to the device without waiting for it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.float64, pin_memory=self._pinned)
        self.tensor = self._host if device.type == "cpu" else torch.zeros_like(self._host, device=device)
        self._last: list[float] | None = None

    def write(self, numbers: Iterable[float | Tensor]) -> Tensor:
        """Take over the present values; those that are tensors go from device to device."""
        values = list(numbers)
        plain = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
        if plain != self._last:
            self._last = plain
            if self.tensor is not self._host:  # the copy of the last step may still be reading the pinned buffer
                self._host = torch.empty_like(self._host, pin_memory=self._pinned)
            self._host.copy_(torch.tensor(plain, dtype=torch.float64))
            if self.tensor is not self._host:
                self.tensor.copy_(self._host, non_blocking=True)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                self.tensor[i].copy_(value.detach().reshape(()), non_blocking=True)
        return self.tensor
