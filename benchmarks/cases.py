"""What the benchmarks of cost train: a model, its loss and one batch of random numbers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from benchmarks import models
from benchmarks.models import GPT
from benchmarks.tasks import symbol_entropy

VOCABULARY, CONTEXT = 256, 128


class Case(NamedTuple):
    """What is trained, and on what; ``attention`` are its multiply-adds without weights, forward and backward."""

    title: str
    model: Callable[[], nn.Module]
    loss_fn: Callable[..., torch.Tensor]
    batch: tuple[torch.Tensor, torch.Tensor]
    attention: int = 0

    def on(self, device: torch.device) -> "Case":
        x, y = self.batch
        return self._replace(model=lambda: self.model().to(device), batch=(x.to(device), y.to(device)))


def gpt(width: int, depth: int, batch: int = 16, heads: int = 4) -> Case:
    text = torch.randint(VOCABULARY, (batch, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    data = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    rows = batch * CONTEXT
    attention = 3 * 2 * depth * rows * CONTEXT * width  # forward and twice that backward, of scores and mixtures
    title = f"GPT, {depth} blocks, width {width}, {batch} x {CONTEXT} symbols"
    return Case(title, lambda: GPT(VOCABULARY, CONTEXT, width, depth, heads), symbol_entropy, data, attention)


def mlp(width: int = 1024, batch: int = 256) -> Case:
    generator, sizes = torch.Generator().manual_seed(0), (784, width, width, width, 10)
    data = torch.randn(batch, 784, generator=generator), torch.randint(10, (batch,), generator=generator)
    title = f"MLP {'-'.join(map(str, sizes))}, {batch} rows"
    return Case(title, lambda: models.mlp(*sizes), functional.cross_entropy, data)


def cnn(batch: int = 64) -> Case:
    generator, channels = torch.Generator().manual_seed(0), (32, 64, 128)
    data = torch.randn(batch, 784, generator=generator), torch.randint(10, (batch,), generator=generator)
    title = f"residual CNN {'-'.join(map(str, channels))} on 28 x 28, {batch} images"
    return Case(title, lambda: models.resnet(channels=channels), functional.cross_entropy, data)


def hidden(model: nn.Module) -> list[torch.Tensor]:
    """The weights that Muon is for, matrices: no convolution, no embedding, and of a language model not the head."""
    return [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
