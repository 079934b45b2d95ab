"""A model's layers, and the rows of their inputs and output gradients, taken by hooks. N rows, O outputs, I inputs."""

import torch
from torch import nn


class Experts(nn.Module):
    """[E, N, I] -> [E, N, O], a matrix each."""

    def __init__(self, members, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(members, inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.bmm(x, self.weight)


class Layer:
    """A weight and its bias. ``lookup``: of an embedding that is no other layer's table as well."""

    def __init__(self, module):
        self.weight, self.bias, self.kind = module.weight, getattr(module, "bias", None), type(module)
        self.lookup, self.uses = self.kind is nn.Embedding, {}

    def matrix(self, tensor):
        """A view ``[O, I]``, or ``[E, O, I]`` of experts, of what is stored like the weight."""
        return tensor.mT if self.lookup or self.kind is Experts else tensor.flatten(1)

    def stored(self, matrix):
        return (matrix.mT if self.lookup or self.kind is Experts else matrix).reshape(self.weight.shape)

    def rows(self, opposite=False):
        """``(a_NI, g_NO)`` of all uses since ``clear``; ``opposite``: of a layer's table, whose one-hots lie along O."""
        return tuple(torch.cat(rows, -2) for rows in zip(*self.uses[opposite], strict=True))

    def clear(self):
        self.uses = {}


def layers(model):
    """By names of the weights."""
    found, names = {}, {p: name for name, p in model.named_parameters()}
    for module in _modules(model):
        found.setdefault(names[module.weight], Layer(module))
    return found


def watch(model):
    """The ``layers``, with rows of each backward from now on."""
    found = layers(model)
    by_weight = {layer.weight: layer for layer in found.values()}
    for module in _modules(model):
        layer = by_weight[module.weight]
        module.register_forward_hook(lambda module, x, y, layer=layer: _listen(layer, module, x[0].detach(), y))
    return found


def _modules(model):
    """Layers, and behind them the embeddings whose table they may have."""
    kinds = nn.Linear | nn.Conv2d | nn.Embedding | Experts
    return sorted((m for m in model.modules() if isinstance(m, kinds)), key=lambda m: isinstance(m, nn.Embedding))


def _listen(layer, module, x, y):
    def take(g):
        opposite = isinstance(module, nn.Embedding) and not layer.lookup
        layer.uses.setdefault(opposite, []).append(_rows(module, x, g))

    if y.requires_grad:
        y.register_hook(take)


def _rows(module, x, g):
    if isinstance(module, Experts):
        return x, g
    if isinstance(module, nn.Embedding):
        x = nn.functional.one_hot(x, len(module.weight))
    elif isinstance(module, nn.Conv2d):
        x = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
        g = g.flatten(2).mT
    return x.flatten(0, -2).to(g.dtype), g.flatten(0, -2)  # a layer multiplies inputs in the dtype of its outputs
