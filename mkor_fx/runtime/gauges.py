"""Numbers that programs keep on the device, for people to read."""

from __future__ import annotations

import torch
from torch import Tensor


class Gauges:
    """0-dim tensors by name, made when a program first asks for them, which writes them in place."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    def make(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        if name not in self._made:
            self._made[name] = torch.zeros((), dtype=dtype, device=device)
        return self._made[name]

    def of(self, name: str) -> Tensor | None:
        """None: no program has it."""
        return self._made.get(name)
