"""Small models in float64, their layers' rows by hooks, and a plain SGD loop whose directions somebody else makes.

``direct(name, t, a_NI, g_NO, G_OI, b)`` gives weight and bias direction of a Linear or Conv2d; the rest is SGD's."""

import copy

import torch
from stepping import stepper
from torch import nn
from torch.nn import functional


class Transformer(nn.Module):
    """One block of causal attention with one head, 11 words."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5 + torch.full((ids.shape[1], ids.shape[1]), -1e9, dtype=x.dtype).triu(1)).softmax(-1)
        return self.head(x + self.out(scores @ v))


def build(kind, count=6):
    """``(model, batches, loss)``"""
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    if kind == "transformer":
        pairs = [(torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6))) for _ in range(count)]
        return Transformer().double(), pairs, lambda out, y: functional.cross_entropy(out.flatten(0, 1), y.flatten())
    if kind == "cnn":
        layers = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)
        pairs = [(randn(6, 2, 5, 5), randn(6, 5)) for _ in range(count)]
    else:
        layers = nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)
        pairs = [(randn(16, 6), randn(16, 4)) for _ in range(count)]
    return nn.Sequential(*layers).double(), pairs, functional.mse_loss


def watch(model):
    """Rows by name of a layer, of the last backward: ``(a_NI, g_NO)``."""
    rows = {}

    def hook(name, layer, x):
        def record(g):
            a = x
            if isinstance(layer, nn.Conv2d):
                a, g = functional.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride).mT, g.movedim(1, -1)
            rows[name] = a.flatten(0, -2), g.flatten(0, -2)

        return record

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(
                lambda m, x, y, name=name: y.register_hook(hook(name, m, x[0].detach())) and None)
    return rows


def by_hand(model, batches, loss_fn, direct, lr, behind=lambda t: None):
    """SGD over what ``direct`` makes of gradients; ``behind`` each step what runs then."""
    rows, layers = watch(model), dict(model.named_modules())
    for t, (x, y) in enumerate(batches):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        with torch.no_grad():
            taken = {p: p.grad for p in model.parameters()}
            for name, (a, g) in rows.items():
                W, b = layers[name].weight, layers[name].bias
                D, d = direct(name, t, a, g, W.grad.flatten(1), None if b is None else b.grad)
                taken |= {W: D.reshape(W.shape)} | ({} if b is None else {b: d})
            for p, D in taken.items():
                p -= lr * D
        behind(t)
        rows.clear()


def lockstep(door, kind, rule, direct, lr=0.1, behind=lambda t: None, tolerance=1e-5, **options):
    """Both ways of training end at the same weights; returns what the door keeps. Factors are float32. Tables are SGD's."""
    options["skip"] = ["embed.*"] if kind == "transformer" else []
    model, batches, loss_fn = build(kind)
    twin = copy.deepcopy(model)
    by_hand(twin, batches, loss_fn, direct, lr, behind)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    done, step = stepper(door, model, loss_fn, optimizer, rule, **options)
    for x, y in batches:
        step(x, y)
    start = dict(build(kind)[0].named_parameters())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        moved, apart = (float(d.detach().norm()) for d in (q - start[name], p - q))
        assert moved > 0 and apart <= tolerance * moved, f"{name} moved by {moved} and is {apart} apart"
    return done.mkor
