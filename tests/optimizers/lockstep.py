"""One optimizer beside itself: as a compiled step, and in torch's own loop."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

import mkor_fx

STEPS = 12


def network(dtype=torch.float64, matrices=False):
    """Matrices, and unless they are to be alone a convolution and vectors."""
    torch.manual_seed(0)
    if matrices:
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).to(dtype)
    layers = nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)
    return nn.Sequential(*layers).to(dtype)


def batches(dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(6, 2, 3, 3, generator=generator).to(dtype), torch.randint(4, (6,), generator=generator)


@dataclass(frozen=True)
class Followed:
    """``apart``: the largest difference of a weight, over its largest change; ``warm``: the optimizer had to step once by
    itself before; ``programs`` were compiled."""

    apart: float
    warm: bool
    programs: int


@dataclass(frozen=True)
class NotFollowed:
    reason: str
    early: bool = True


class Own(Exception):
    """An optimizer does not run by itself."""


def eager(network, optimizer, x, y):
    optimizer.zero_grad()
    functional.cross_entropy(network(x), y).backward()
    optimizer.step()


def beside_itself(build, dtype=torch.float64, matrices=False):
    """``build(model)`` makes an optimizer; its rates change from step to step.

    Raises:
        Own: its own loop fails.
    """
    model = network(dtype, matrices)
    twin = copy.deepcopy(model)
    data = list(batches(dtype))
    try:
        own, other = build(model), build(twin)
        weights = [[p.detach().clone() for p in twin.parameters()]]
        for number, (x, y) in enumerate(data):
            _prepare(other, number)
            eager(twin, other, x, y)
            weights.append([p.detach().clone() for p in twin.parameters()])
    except Exception as error:
        raise Own(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error
    step, warm, apart = None, False, 0.0
    for number, (x, y) in enumerate(data):
        _prepare(own, number)
        state = str(own.state_dict().get("state"))
        try:
            if step is None:
                step = mkor_fx.compile_step(model, functional.cross_entropy, own, None, backend="eager")
            step(x, y)
        except ValueError as error:
            if number or "once before compile_step" not in str(error):
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights[number], strict=True))
                assert str(own.state_dict().get("state")) == state
                return NotFollowed(str(error).splitlines()[0], early=step is None)
            warm, step = True, None
            eager(model, own, x, y)
        for p, q in zip(model.parameters(), weights[number + 1], strict=True):
            apart = max(apart, (p.detach() - q).abs().max().item())
    moved = max((q - p).abs().max().item() for p, q in zip(weights[0], weights[-1], strict=True))
    return Followed(apart / max(moved, 1e-9), warm, step.compilations)


def refusal(build):
    """Why a compiled step does not take what does not run by itself either; None: it does, or there is nothing to take,
    since building it raises, whatever that is: the caller has that error."""
    model = network()
    try:
        optimizer = build(model)
    except Exception:
        return None
    try:
        mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    except ValueError as error:
        return NotFollowed(str(error).splitlines()[0])
    return None


def _prepare(optimizer, number):
    torch.manual_seed(number)
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), float):
            first = group.setdefault("initial_lr", group["lr"])
            group["lr"] = first / (1 + 0.1 * number)
