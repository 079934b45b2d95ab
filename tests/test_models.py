"""Modules and settings that other tools trip over, through both doors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR


def train(door, model, batch, loss_fn, around=torch.enable_grad, steps=3):
    """``steps`` steps on one batch; returns coverage and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = batch
    if door == "step":
        step = mkor_fx.compile_step(model, loss_fn, optimizer, backend="eager", rule=mkor_fx.MKOR.published())
        for _ in range(steps):
            with around():
                loss = step(x, y)
        return step.coverage, loss
    compiled = mkor_fx.compile(model, backend="eager", rule=mkor_fx.MKOR.published())
    for _ in range(steps):
        optimizer.zero_grad()
        with around():
            loss = loss_fn(compiled(x), y)
        loss.backward()
        optimizer.step()
    assert compiled.mkor.step == steps
    return compiled.coverage, loss.detach()


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


BARE = {
    "Linear": (lambda: nn.Linear(8, 4), 1.0),
    "Sequential": (lambda: nn.Sequential(nn.Linear(8, 4)), 1.0),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2 / 3),
    "MultiheadAttention": (SelfAttention, 1.0),
}


@pytest.mark.parametrize("door", ["step", "drop-in"])
@pytest.mark.parametrize("name", BARE)
def test_torchs_own_modules_are_captured(name, door):
    """``nn.Module.compile`` compiles nothing of these, silently; packed projections are no ``nn.Linear``."""
    build, share = BARE[name]
    coverage, _ = train(door, build(), (torch.randn(2, 5, 8), torch.zeros(())), lambda out, y: (out**2).mean() + y)
    assert coverage.share()[0] == pytest.approx(share)
    assert all(len(entry.shape) == 1 for entry in coverage.declined)


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 5))


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("around", [torch.enable_grad, autocast])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_and_channels_last_in_both_doors(around, memory_format):
    model = network().to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    batch = torch.randn(6, 2, 6, 6).to(memory_format=memory_format), torch.randint(0, 5, (6,))
    (coverage, loss), (_, other) = (
        train(door, m, batch, functional.cross_entropy, around) for door, m in (("step", model), ("drop-in", twin))
    )
    assert coverage.share() == (1.0, 1.0)
    torch.testing.assert_close(loss, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_frozen_and_unused_parameters():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Parameter(torch.randn(6, 8), requires_grad=False)
            self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return x @ (self.frozen + self.up @ self.down).t()

    for door in ("step", "drop-in"):
        model = Adapted()
        before = model.frozen.clone(), model.unused.weight.detach().clone()
        coverage, _ = train(door, model, (torch.randn(4, 8), torch.zeros(())), lambda out, y: (out**2).mean() + y)
        assert {entry.name for entry in coverage.covered} == {"down", "up"}
        assert {entry.name for entry in coverage.declined} == {"unused.weight", "unused.bias"}
        assert torch.equal(model.frozen, before[0]) and torch.equal(model.unused.weight, before[1])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_default_rule_does_not_depend_on_the_scale_of_the_loss(scale):
    """The directions of two trainings whose losses differ by a factor differ by just that factor."""
    torch.manual_seed(1)
    model = network().double()
    batch = torch.randn(6, 2, 6, 6).double(), torch.randint(0, 5, (6,))
    directions = []
    for factor in (1.0, scale):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0 / factor)
        step = mkor_fx.compile_step(
            trained, lambda out, y, f=factor: f * functional.cross_entropy(out, y), optimizer,
            MKOR.published(factor_dtype=torch.float64), backend="eager",
        )
        step(*batch)
        directions.append([p.detach() - q.detach() for p, q in zip(trained.parameters(), model.parameters())])
    for one, other in zip(*directions):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
