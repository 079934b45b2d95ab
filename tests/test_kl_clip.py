"""The clip of the KL divergence: one factor for all weights of a rule, beside a loop written out here."""

import copy

import processes
import pytest
import torch
from contract import Contract
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, Eva

RULE = KFAC(derive_every=1, damping=0.1, graft=None, kl_clip=1e-4)
RATES = (0.2, 0.05)


class Clipped(Contract):
    """All directions times ``min(1, sqrt(kl_clip / |sum lr^2 <D, G>|))``; SGD without momentum."""

    shares = ()

    @torch.no_grad()
    def step(self):
        raw = {p: p.grad.clone() for group in self.optimizer.param_groups for p in group["params"]}
        held = copy.deepcopy([p.detach() for p in raw])
        rates = {p: group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        super().step()
        directions = {p: (before - p) / rates[p] for p, before in zip(raw, held, strict=True)}
        total = sum(rates[p] ** 2 * (D * raw[p]).sum() for p, D in directions.items())
        share = (self.rule.kl_clip / total.abs()).sqrt().clamp(max=1)
        self.shares = (*self.shares, float(share))
        for p, before in zip(raw, held, strict=True):
            p.copy_(before - rates[p] * share * directions[p])


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    batches = [(torch.randn(8, 6).double(), torch.randn(8, 4).double()) for _ in range(5)]
    return model, batches


def sgd(model):
    matrices, biases = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    return torch.optim.SGD([{"params": matrices, "lr": RATES[0]}, {"params": biases, "lr": RATES[1]}])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(door, model, batches, rule, scale=None, **options):
    optimizer = sgd(model)
    if door == "compile_step":
        step = mkor_fx.compile_step(model, mse_loss, optimizer, rule, backend="eager", **options)
        for batch in batches:
            step(*batch)
        return
    compiled = mkor_fx.compile(model, rule, backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(mse_loss(compiled(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()


def close(found, expected, tolerance=1e-5):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def reference(rule):
    model, batches = build()
    stepper = Clipped(model, sgd(model), rule)
    for x, y in batches:
        mse_loss(model(x), y).backward()
        stepper.step()
    return weights(model), stepper.shares


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("rule", [RULE, Eva(graft=None, kl_clip=1e-3)], ids=["kfac", "eva"])
def test_beside_the_reference(rule, door):
    model, batches = build()
    train(door, model, batches, rule)
    expected, shares = reference(rule)
    close(weights(model), expected)
    assert min(shares) < 0.9


def test_a_bound_that_does_not_bind_changes_nothing():
    plain, bound = build(), build()
    train("compile_step", *plain, KFAC(derive_every=1, damping=0.1, graft=None))
    train("compile_step", *bound, KFAC(derive_every=1, damping=0.1, graft=None, kl_clip=1e6))
    assert all(torch.equal(p, q) for p, q in zip(plain[0].parameters(), bound[0].parameters(), strict=True))


def test_a_loss_scale_does_not_count():
    model, batches = build()
    train("compile", model, batches, RULE, scale=1024.0)
    close(weights(model), reference(RULE)[0])


def on_a_rank(rank, size, placement):
    model, batches = build()
    batches = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in batches]
    options = {"placement": placement, "communication": mkor_fx.Communication(padding=9.0)}
    train("compile_step", model, batches, RULE, **options)
    return weights(model)


@pytest.mark.parametrize(("size", "placement"), [(2, "replicated"), (2, "owner"), (4, 0.5)])
def test_ranks_are_one_process(size, placement):
    """A rank without a weight of its own clips alike."""
    for found in processes.values(on_a_rank, size, placement):
        close(found, reference(RULE)[0])


def test_where_it_cannot_be_it_is_refused():
    model = build()[0]
    with pytest.raises(ValueError, match=r"sizes all directions together \(kl_clip\).*precondition='step'"):
        mkor_fx.compile(model, RULE, precondition="backward", backend="eager")
    with pytest.raises(ValueError, match=r"KFAC\(kl_clip=0\.1, graft='gradient'\): .*use graft=None"):
        mkor_fx.compile(model, KFAC(kl_clip=0.1), backend="eager")
    with pytest.raises(ValueError, match=r"KFAC\(kl_clip=0\.0\): must be positive, e\.g\. 1e-3, or None"):
        KFAC(kl_clip=0.0)
