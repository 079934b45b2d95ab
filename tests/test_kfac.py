"""K-FAC against its equations, written out here without the rule."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC
from mkor_fx.rules import Gradient
from mkor_fx.rules.kfac import newton_inverse

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


def trained(rule, batches=4, **options):
    """A weight's state behind some steps with a rate of zero, and the direction of the last as SGD saw it."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, backend="eager", **options)
    for _ in range(batches):
        step(torch.randn(16, 6).double(), torch.randn(16, 4).double())
    return {key.removeprefix("weight."): t.double() for key, t in step.mkor.state_dict().items()}


def test_the_eigenbasis_inverts_the_whole_curvature():
    """Against ``solve(L (x) R + damping, vec(G))``, and a bias against ``solve(L + damping, b)``."""
    rule = KFAC(inverse="eigen", derive_every=1, damping=DAMPING)
    state, G, b = trained(rule), torch.randn(4, 6).double(), torch.randn(4).double()
    found = rule.precondition(state, Gradient(G, b))
    fresh = {name: Q @ q.diag() @ Q.T for name in "LR" for Q, q in [(state[f"{name}_basis"], state[f"{name}_values"])]}
    whole = torch.kron(fresh["L"], fresh["R"]) + DAMPING * torch.eye(24).double()
    expected = torch.linalg.solve(whole, G.flatten()).view(4, 6)
    torch.testing.assert_close(found.weight, expected, rtol=1e-4, atol=1e-5)  # bases are float32
    expected = torch.linalg.solve(fresh["L"] + DAMPING * torch.eye(4).double(), b)
    torch.testing.assert_close(found.bias, expected, rtol=1e-4, atol=1e-5)
    for name in "LR":
        torch.testing.assert_close(fresh[name], state[name], rtol=1e-5, atol=1e-6)


def test_factors_that_are_multiples_of_the_identity():
    rule, G = KFAC(inverse="eigen", damping=DAMPING), torch.randn(4, 6).double()
    eye = lambda n: torch.eye(n).double()
    one = torch.ones(()).double()
    state = {"L": 2 * eye(4), "R": 3 * eye(6), "L_basis": eye(4), "R_basis": eye(6), "seen": one, "derived": 0 * one,
             "L_values": 0 * eye(4)[0], "R_values": 0 * eye(6)[0]}  # fmt: skip
    assert torch.equal(rule.precondition(state, Gradient(G)).weight, G)  # nothing derived yet
    derived = rule.derive(state)
    torch.testing.assert_close(rule.precondition(derived, Gradient(G)).weight, G / (6 + DAMPING), rtol=1e-12, atol=0)
    left, right = KFAC(damping=DAMPING)._damped(state).values()
    torch.testing.assert_close(left[0, 0] * right[0, 0], ((6**0.5 + DAMPING**0.5) ** 2) * one, rtol=1e-12, atol=0)
    left, right = KFAC(damping=DAMPING, pi=False)._damped(state).values()
    assert left[0, 0] == 2 + DAMPING and right[0, 0] == 3 + DAMPING


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_newton_finds_the_inverse_from_any_guess_and_follows_it(scale):
    torch.manual_seed(0)
    rows = torch.randn(40, 12).double() * torch.logspace(-1, 1, 12).double()
    A, X = scale * rows.T @ rows, torch.eye(12).double()
    for _ in range(12):
        X = newton_inverse(A, X, 3)
        assert torch.linalg.eigvalsh(X)[0] > 0
    torch.testing.assert_close(X, A.inverse(), rtol=1e-10, atol=0)
    moved = 0.95 * A + 0.05 * scale * torch.randn(12, 12).double().square().diag().diag()
    X = newton_inverse(moved, X, 6)
    torch.testing.assert_close(X @ moved, torch.eye(12).double(), rtol=0, atol=1e-10)
    outlier = moved + 10 * moved.trace() * torch.ones(12, 12).double()  # far beyond what the old inverse converges for
    for _ in range(20):
        X = newton_inverse(outlier, X, 3)
        assert torch.linalg.eigvalsh(X)[0] > 0
    torch.testing.assert_close(X, outlier.inverse(), rtol=1e-6, atol=1e-6 / scale)


@pytest.mark.parametrize(("condition", "tolerance"), [(1e2, 1e-5), (1e4, 1e-3), (1e6, 1.0)])
def test_newton_stays_positive_definite_in_float32(condition, tolerance):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64).double())[0]
    A, X = (basis * torch.logspace(0, -math.log10(condition), 64).double()) @ basis.T, torch.eye(64)
    for _ in range(60):
        X = newton_inverse(A.float(), X, 3)
        assert torch.linalg.eigvalsh(X.double())[0] > 0.1  # that of the inverse is 1
    assert (X.double() - A.inverse()).norm() < tolerance * A.inverse().norm()


def test_newton_in_the_program_is_cholesky_in_the_end():
    options = {"damping": 0.1, "decay": 0.0}
    newton, exact = trained(KFAC(inverse="newton", newton_steps=20, **options)), trained(KFAC(derive_every=1, **options))
    assert torch.equal(newton["L"], exact["L"])
    for name in ("L_inverse", "R_inverse"):
        torch.testing.assert_close(newton[name], exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "newton"])
def test_numbers_that_change_are_numbers(inverse):
    changing = trained(KFAC(inverse=inverse, derive_every=1, damping=lambda step: 0.1, decay=lambda step: 0.9))
    constant = trained(KFAC(inverse=inverse, derive_every=1, damping=0.1, decay=0.9))
    for key, tensor in constant.items():
        torch.testing.assert_close(changing[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inverse": "lu"}, r"KFAC\(inverse='lu'\): must be 'cholesky', 'eigen' or 'newton'"),
        ({"newton_steps": 0}, r"KFAC\(newton_steps=0\): must be an integer of at least 1"),
        ({"damping": 0.0}, r"KFAC\(damping=0\.0\): must be positive"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        KFAC(**options)
