"""What random signs are drawn by: alike in a resumed run and in both doors, unlike in each step, micro-batch and rank."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .ranks import Ranks


def draw_of(step: int, use: int, ranks: Ranks | None, device: torch.device) -> Tensor:
    """0-dim int64, on the device without waiting for it. ``use`` counts what is drawn in one step, 0 first."""
    rank = 0 if ranks is None else ranks.rank
    return torch.full((), (step << 32) + (use << 16) + rank, dtype=torch.int64, device=device)


class Draws:
    """How often each weight was used in this step, by calls of compiled graphs."""

    def __init__(self) -> None:
        self._step = 0
        self._uses: dict[int, tuple[weakref.ref[nn.Parameter], int]] = {}

    def next(self, params: Iterable[nn.Parameter], step: int) -> int:
        """The number of a call with ``params``: one that none of them has had in this step."""
        if step != self._step:
            self._step, self._uses = step, {}
        params = list(params)
        counts = [count for p in params if (known := self._uses.get(id(p))) and known[0]() is p for count in known[1:]]
        use = max(counts, default=-1) + 1
        for p in params:
            self._uses[id(p)] = weakref.ref(p), use
        return use
