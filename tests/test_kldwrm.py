"""KLD-WRM against the minimisation that it stands for, and against its equations."""

import copy
from dataclasses import replace

import pytest
import torch
from kldwrm import KldwrmReference
from rows import model_and_batches
from stepping import stepper

from mkor_fx import KFAC, KLDWRM
from mkor_fx.rules import Gradient, Shape, Use

ONE, STEP = torch.ones(()).double(), torch.tensor(0)


def randn(*size):
    return torch.randn(*size, dtype=torch.float64)


def factor(n):
    X = randn(3 * n, n)
    return X.T @ X / len(X)


def fresh(rule, shape):
    return {key: t.double() for key, t in rule.init(shape, torch.device("cpu")).items()}


def one_step(rule, state, L, G, R=None, b=None):
    """``(direction, state)`` with the inverse of this very step."""
    uses = [Use((randn(0) if R is None else R, L), ONE, False)]
    state = rule.derive(rule.update(state, uses, Gradient(G, b), STEP))
    state = rule.advance(state, Gradient(G, b), STEP)
    return rule.precondition(state, Gradient(G, b)), state


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("variant", ["so", "q"])
def test_a_step_is_the_minimiser_regularised_by_all_earlier_networks(variant, inverse):
    """Six parameters with a curvature of ``L_i (x) 1``, whose damping belongs to the metric; a rate that changes."""
    torch.manual_seed(0)
    damping, decay, eye = 0.05, 0.7, torch.eye(3).double()
    added = damping if inverse == "eigen" else damping**0.5  # Cholesky's is shared out over two sides, of which one is
    W, curvatures, networks = randn(3, 2), [], []
    rule = KLDWRM(variant=variant, decay=decay, damping=damping, inverse=inverse, rate=1.0)
    state = fresh(rule, Shape(3, 2, lookup=True))
    for k, rate in enumerate((0.5, 0.4, 0.4, 0.1, 0.2)):
        G, L = randn(3, 2), factor(3)
        curvatures.append(L + added * eye)
        networks.append(W.clone())
        made, state = one_step(replace(rule, rate=rate), state, L, G)
        weights = [decay ** (k - i) * (1 if i == 0 else 1 - decay) for i in range(k + 1)]
        S = torch.zeros(3, 2).double().requires_grad_()
        value = (G * S).sum() + ((S * (L @ S)).sum() / 2 if variant == "q" else 0)
        for w, F, old in zip(weights, curvatures, networks, strict=True):
            apart = W + S - old
            value = value + w / (2 * rate) * (apart * (F @ apart)).sum()
        first = torch.autograd.grad(value, S, create_graph=True)[0]
        hessian = torch.stack([torch.autograd.grad(first.flatten()[i], S, retain_graph=True)[0].flatten() for i in range(6)])
        best = -torch.linalg.solve(hessian, first.detach().flatten()).view(3, 2)
        torch.testing.assert_close(-rate * made.weight, best, rtol=1e-9, atol=1e-10)
        W = W + best


@pytest.mark.parametrize("variant", ["so", "q"])
def test_without_memory_it_is_natural_gradient_descent(variant):
    torch.manual_seed(0)
    rule = KLDWRM(variant=variant, decay=0.0, damping=0.1, rate=0.5)
    state = fresh(rule, Shape(3, 4, bias=True))
    for _ in range(3):
        L, R, G, b = factor(3), factor(4), randn(3, 4), randn(3)
        made, state = one_step(rule, state, L, G, R, b)
        share = 1.5 if variant == "q" else 1.0  # the average is this step's curvature
        F = torch.kron(share * L, share * R) + 0.1 * torch.eye(12).double()
        torch.testing.assert_close(made.weight, torch.linalg.solve(F, G.flatten()).view(3, 4), rtol=1e-9, atol=1e-10)
        expected = torch.linalg.solve(share * L + 0.1 * torch.eye(3).double(), b)
        torch.testing.assert_close(made.bias, expected, rtol=1e-9, atol=1e-10)


def test_gradients_that_agree_give_the_share_of_kfac_that_is_new():
    torch.manual_seed(0)
    L, R, G = factor(3), factor(4), randn(3, 4)
    rule, other = KLDWRM(decay=0.9, damping=0.1), KFAC(decay=0.9, damping=0.1, inverse="eigen")
    state = fresh(rule, Shape(3, 4))
    for _ in range(3):
        made, state = one_step(rule, state, L, G, R)
    plain = other.precondition(state, Gradient(G)).weight
    torch.testing.assert_close(made.weight, 0.1 * plain, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("share", "shrinks"), [(1.0, True), (1.1, False)])
def test_so_steps_converge_for_half_the_rates_of_kfac(share, shrinks):
    """``share = rate h / F`` on a parabola: below ``2 / (1 + decay) = 1.053``."""
    rule, w, F = KLDWRM(decay=0.9, damping=0.5), torch.ones(1, 1).double(), 2.0
    state = fresh(rule, Shape(1, 1, lookup=True))
    for _ in range(200):
        made, state = one_step(rule, state, torch.full((1, 1), F - 0.5).double(), w)
        w = w - share * F * made.weight
    assert (w.abs() < 1e-3) == shrinks and (w.abs() > 1e3) != shrinks


def test_a_rate_of_nothing_makes_the_second_variant_the_first():
    torch.manual_seed(0)
    rules = [KLDWRM(decay=0.9, damping=0.1), KLDWRM(variant="q", decay=0.9, damping=0.1, rate=0.0)]
    states = [fresh(rule, Shape(3, 4, bias=True)) for rule in rules]
    for _ in range(4):
        given = factor(3), randn(3, 4), factor(4), randn(3)
        made = []
        for i, rule in enumerate(rules):
            direction, states[i] = one_step(rule, states[i], *given)
            made.append(direction)
        torch.testing.assert_close(made[0].weight, made[1].weight, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(made[0].bias, made[1].bias, rtol=1e-9, atol=1e-10)


# ---- in both doors ----------------------------------------------------------------------------------------------------


def trajectories(door, kind, variant, refresh_every, every, rates):
    model, loss_fn, batches = model_and_batches(kind, len(rates))
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    changes = len(set(rates)) > 1
    rule = KLDWRM(variant=variant, decay=0.8, damping=0.1, derive_every=every, kl_clip=None,
                  rate=(lambda step: rates[step]) if changes else rates[0])  # fmt: skip
    reference = KldwrmReference(twin, variant, refresh_every, every, 0.8, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    held = {p for module, _ in reference.layers.values() for p in module.parameters()}
    rest = [p for p in twin.parameters() if p not in held]
    done, step = stepper(door, model, loss_fn, optimizer, rule, refresh_every=refresh_every)
    for (x, y), rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        step(x, y)
        twin.zero_grad()
        loss_fn(twin(x), y).backward()
        reference.step(rate)
        with torch.no_grad():
            for p in rest:
                p -= rate * p.grad
    for p, q, old in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # factors are float32
        assert (p - old).abs().max() > 1e-3
    state = done.mkor.state_dict()
    for (name, part), left in reference.left.items():
        found = state[f"{name}.{'bias_' if part == 'bias' else ''}wake"].double().view_as(left)
        assert (found - left).norm() < 1e-4 * left.norm(), name


SAME, FALLING = [0.05] * 6, [0.1, 0.08, 0.06, 0.05, 0.02, 0.04]


@pytest.mark.parametrize(("door", "variant", "every", "rates"), [
    ("compile_step", "so", 1, FALLING),
    ("compile", "q", 1, FALLING),
    pytest.param("compile", "so", 1, FALLING, marks=pytest.mark.nightly),
    pytest.param("compile_step", "q", 1, FALLING, marks=pytest.mark.nightly),
    *(pytest.param(door, variant, 3, SAME, marks=pytest.mark.nightly)
      for door in ("compile", "compile_step") for variant in ("so", "q")),
])  # fmt: skip
def test_a_perceptron_goes_the_way_of_the_equations(door, variant, every, rates):
    trajectories(door, "mlp", variant, 1 if every == 1 else 2, every, rates)


@pytest.mark.nightly
@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("variant", ["so", "q"])
@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_so_do_a_convolution_and_a_transformer(kind, variant, door):
    trajectories(door, kind, variant, 2, 2, FALLING)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "qe"}, r"KLDWRM\(variant='qe'\): differentiates the divergence at the networks of earlier.*use 'q'"),
        ({"variant": "kl"}, r"KLDWRM\(variant='kl'\): must be 'so' or 'q'"),
        ({"variant": "q"}, r"KLDWRM\(variant='q', rate=None\): weighs this step's curvature by the learning rate"),
        ({"rate": -0.1}, r"KLDWRM\(rate=-0\.1\): must not be negative"),
        ({"inverse": "lu"}, r"KLDWRM\(inverse='lu'\): must be"),
        ({"damping": 0.0}, r"KLDWRM\(damping=0\.0\): must be positive"),
        ({"decay": 1.0}, r"KLDWRM\(decay=1\.0\): the weight of the old average"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        KLDWRM(**options)
