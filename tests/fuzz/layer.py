"""What a layer with a weight is: it draws itself for an input, prints itself, and says to the tape what it did."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

SIZES = (1, 2, 3, 4, 5, 6, 8)


class Layer(nn.Module):
    """``rank`` is the number of dimensions that the input needs (None: any of two or more), ``text`` the program's line."""

    rank: int | None = None
    text = ""

    def __init__(self, rng: random.Random, x: Tensor, earlier: list[Layer]) -> None:
        super().__init__()
        self.draw(rng, x)

    def draw(self, rng: random.Random, x: Tensor) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.text


def weight(*shape: int, fan: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / max(1, fan) ** 0.5)


def vector(rng: random.Random, size: int) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(size) / 2) if rng.random() < 0.6 else None
