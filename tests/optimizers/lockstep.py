"""One optimizer beside itself: as a compiled step, and in torch's own loop."""

import copy
import warnings

import torch
from torch import nn
from torch.nn import functional

import mkor_fx

STEPS = 8


def network():
    """Matrices, a convolution and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)
    ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(6, 2, 3, 3, generator=generator).double(), torch.randint(4, (6,), generator=generator)


def rates(*optimizers, number):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group.get("lr"), float):
                group.setdefault("first", group["lr"])
                group["lr"] = group["first"] / (1 + 0.1 * number)


def deviation(build):
    """``build(params)`` makes an optimizer. The largest difference of a weight over the steps, relative to its largest change;
    whether it had to step once by itself before. ValueError: the compiled step refuses it; says why.
    """
    model = network()
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    own, other = build(list(model.parameters())), build(list(twin.parameters()))
    data, warm = list(batches()), False
    step = None

    def eager(network, optimizer, x, y):
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    for number, (x, y) in enumerate(data):
        rates(own, other, number=number)
        torch.manual_seed(number)
        try:
            if step is None:
                step = mkor_fx.compile_step(model, functional.cross_entropy, own, None, backend="eager")
            step(x, y)
        except ValueError as error:
            if number or "once before compile_step" not in str(error):
                raise
            warm, step = True, None
            torch.manual_seed(number)
            eager(model, own, x, y)
        torch.manual_seed(number)
        eager(twin, other, x, y)
    moved = max((q.detach() - s).abs().max().item() for q, s in zip(twin.parameters(), start, strict=True))
    apart = max((p - q).detach().abs().max().item() for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    return apart / max(moved, 1e-12), warm, step.compilations
