"""K-FAC against its equations, written out here without the rule."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC

DECAY, DAMPING, LR = 0.9, 0.03, 0.1


def by_hand(model, batches, every, refresh_every=1):
    """Linear layers under a mean squared error and SGD, float64; inverses are used from the step behind the one that made
    them."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    rows, factors, inverses = {}, {}, {}
    for i, layer in enumerate(layers):
        def watch(module, x, y, i=i):
            a = x[0].detach()
            y.register_hook(lambda g: rows.__setitem__(i, (a, g)))

        layer.register_forward_hook(watch)
    for t, (x, y) in enumerate(batches):
        model.zero_grad()
        functional.mse_loss(model(x), y).backward()
        for i, layer in enumerate(layers):
            if t % refresh_every == 0:
                a, g = rows[i]
                new = {"R": a.T @ a / len(a), "L": len(a) * g.T @ g}
                old = factors.get(i)
                factors[i] = new if old is None else {k: DECAY * old[k] + (1 - DECAY) * new[k] for k in new}
            with torch.no_grad():
                for p in (layer.weight, layer.bias):
                    D = p.grad
                    if i in inverses:
                        L, R = inverses[i]
                        D = L @ p.grad @ R if p.dim() == 2 else L @ p.grad
                        D = D * p.grad.norm() / D.norm()
                    p -= LR * D
            if t % every == 0:
                L, R = factors[i]["L"], factors[i]["R"]
                pi = ((R.trace() / len(R)) / (L.trace() / len(L))) ** 0.5
                eye = lambda M: torch.eye(len(M), dtype=M.dtype)
                inverses[i] = (torch.linalg.inv(L + DAMPING**0.5 / pi * eye(L)),
                               torch.linalg.inv(R + DAMPING**0.5 * pi * eye(R)))  # fmt: skip
    return factors, inverses


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize(("every", "refresh_every"), [(1, 1), (3, 1), (2, 2)])
def test_equations(door, every, refresh_every):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    twin = copy.deepcopy(model)
    batches = [(torch.randn(16, 6).double(), torch.randn(16, 4).double()) for _ in range(7)]
    factors, inverses = by_hand(twin, batches, every, refresh_every)
    rule = KFAC(decay=DECAY, damping=DAMPING, derive_every=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if door == "compile_step":
        done = step = mkor_fx.compile_step(
            model, functional.mse_loss, optimizer, rule, refresh_every=refresh_every, backend="eager"
        )
    else:
        done = mkor_fx.compile(model, rule, refresh_every=refresh_every, backend="eager")

        def step(x, y):
            optimizer.zero_grad()
            functional.mse_loss(done(x), y).backward()
            optimizer.step()

    for x, y in batches:
        step(x, y)
    state = done.mkor.state_dict()
    for i, name in enumerate(("0.weight", "2.weight")):
        found = {key: state[f"{name}.{key}"].double() for key in ("L", "R", "L_inverse", "R_inverse")}
        expected = {**factors[i], "L_inverse": inverses[i][0], "R_inverse": inverses[i][1]}
        for key, tensor in found.items():  # factors are float32
            assert (tensor - expected[key]).norm() < 1e-5 * expected[key].norm(), key
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_factor_that_has_no_inverse_keeps_the_one_before_and_says_so():
    """What Cholesky refuses: here an input so large that the damping is lost in rounding."""
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, KFAC(derive_every=1, damping=1e-12), backend="eager")
    step(torch.randn(16, 6), torch.randn(16, 4))
    before = step.mkor.state_dict()
    assert not torch.equal(before["weight.R_inverse"], torch.eye(6))
    with pytest.warns(UserWarning, match=r"weight keeps what it has derived before: linalg.cholesky"):
        step.mkor.of(model.weight)["R"].copy_(torch.ones(6, 6) * 1e8 - torch.eye(6) * 1e6)
        step(1e4 * torch.ones(16, 6), torch.randn(16, 4))
    after = step.mkor.state_dict()
    assert torch.equal(after["weight.R_inverse"], before["weight.R_inverse"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_side_that_is_too_large_stays_the_identity():
    model = nn.Linear(40, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, KFAC(max_factor=8), backend="eager")
    step(torch.randn(16, 40), torch.randn(16, 4))
    assert set(step.mkor.state_dict()) == {"weight.L", "weight.L_inverse", "weight.seen", "step"}
    assert step.coverage["weight"].sent == 4 * 4 + 1
