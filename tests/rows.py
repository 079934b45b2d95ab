"""Rows of inputs and output gradients of a model's Linear, Conv2d and Embedding layers, taken by hooks."""

import torch
from torch import nn


def watch(model):
    """``{weight's name: (module, rows)}``; ``rows`` is a list of pairs ``a_NI, g_NO`` that each backward adds to. An
    embedding has ``None`` for ``a_NI``."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            rows = []
            found[f"{name}.weight" if name else "weight"] = module, rows
            module.register_forward_hook(lambda module, x, y, rows=rows: _record(module, x[0].detach(), y, rows))
    return found


def _record(module, x, y, rows):
    def take(g):
        if isinstance(module, nn.Embedding):
            rows.append((None, g.flatten(0, -2)))
        elif isinstance(module, nn.Conv2d):
            a = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            rows.append((a.mT.flatten(0, 1), g.movedim(1, -1).flatten(0, -2)))
        else:
            rows.append((x.flatten(0, -2), g.flatten(0, -2)))

    if y.requires_grad:
        y.register_hook(take)


def matrix(module, tensor):
    """A view ``[O, I]`` of what is stored like a layer's weight."""
    return tensor.T if isinstance(module, nn.Embedding) else tensor.flatten(1)


class Attention(nn.Module):
    """A transformer of one layer: tokens ``[N, T]`` -> logits ``[N, T, 11]``."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def model_and_batches(kind, steps):
    """``(model, loss_fn, batches)`` in float64: "mlp", "cnn" or "transformer"."""
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    if kind == "transformer":
        ids = lambda: torch.randint(0, 11, (3, 5))
        loss_fn = lambda out, target: nn.functional.cross_entropy(out.flatten(0, 1), target.flatten())
        return Attention().double(), loss_fn, [(ids(), ids()) for _ in range(steps)]
    if kind == "cnn":
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
        return model.double(), nn.functional.mse_loss, [(randn(6, 2, 4, 4), randn(6, 5)) for _ in range(steps)]
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))
    return model.double(), nn.functional.mse_loss, [(randn(16, 7), randn(16, 5)) for _ in range(steps)]
