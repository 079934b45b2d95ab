"""Numbers that programs keep on the device, for people to read."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class Gauges:
    """0-dim tensors by name, made when a program first asks for them, which writes them in place."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}
        self._told = False
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    def make(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        if name not in self._made:
            self._made[name] = torch.zeros((), dtype=dtype, device=device)
        return self._made[name]

    def of(self, name: str) -> Tensor | None:
        """None: no program has it."""
        return self._made.get(name)

    def tell_of_skips(self) -> None:
        """Warn, once, where a step has been skipped. Does not wait: on CUDA the count is of some steps ago."""
        skipped = self._made.get("skipped")
        if skipped is None or self._told:
            return
        if skipped.is_cuda:
            skipped = self._on_the_host(skipped)
        if skipped is not None and skipped > 0:
            self._told = True
            warnings.warn(
                "mkor_fx: a step was skipped, since its loss or a gradient was not finite, and has changed nothing. "
                "That is said "
                "once; step.skipped counts. If it goes on growing, the run has diverged or its data are bad: try a lower "
                "learning rate, clip_norm=1.0, or look at the batch",
                stacklevel=3,
            )

    def _on_the_host(self, number: Tensor) -> Tensor | None:
        """As it was when it was last asked for; None: that is on its way still."""
        if self._coming is None:
            host = torch.empty((), dtype=number.dtype, pin_memory=True)
            host.copy_(number, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._coming = host, event
        host, event = self._coming
        if not event.query():
            return None
        self._coming = None
        return host
