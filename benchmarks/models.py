"""The models of the benchmarks: a chain of linear layers, two small convolutional networks and a small GPT.

Shapes: B sequences or examples, T positions, D model width, V symbols.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with a ReLU between each two: `[B, widths[0]] -> [B, widths[-1]]`."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(*, channels: tuple[int, ...] = (16, 32, 64), classes: int = 10) -> nn.Sequential:
    """Three strided 3x3 convolutions, a mean over positions and a linear layer: `[B, 784] -> [B, classes]`."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for fan_in, fan_out in pairwise((1, *channels)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=1 if fan_in == 1 else 2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norms around a shortcut: `[B, C, H, W] -> [B, C', H / stride, W / stride]`."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(fan_out) for _ in range(2))
        alike = stride == 1 and fan_in == fan_out
        self.shortcut = nn.Identity() if alike else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


def resnet(*, channels: tuple[int, ...] = (32, 64, 128), classes: int = 10) -> nn.Sequential:
    """A residual network on images of 28 x 28, halved between stages: `[B, 784] -> [B, classes]`."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for fan_in, fan_out in pairwise((1, *channels)):
        layers += [Residual(fan_in, fan_out, 1 if fan_in == 1 else 2), Residual(fan_out, fan_out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class Block(nn.Module):
    """Pre-norm transformer block with causal attention: `[B, T, D] -> [B, T, D]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Decoder-only language model: symbols `[B, T]` (int64) to logits `[B, T, V]`."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.symbols.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.symbols(symbols) + self.positions[: symbols.shape[1]]
        return self.head(self.norm(self.blocks(x)))
