"""The MKOR rule against its equations, on small matrices in float64 unless the dtype is the point."""

import math

import pytest
import torch

from mkor_fx.rules import MKOR, Gradient, Shape, Use
from mkor_fx.rules.mkor_options import BIASES, PUBLISHED

OUT, IN, ROWS = 8, 16, 32
SHAPE, STEP = Shape(OUT, IN, bias=True), torch.tensor(0)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(dtype=torch.float64, seed=0):
    return Gradient(randn(OUT, IN, seed=seed, dtype=dtype), randn(OUT, seed=seed + 1, dtype=dtype))


def use(rule, a_NI, g_NO, opposite=False):
    shape = Shape(g_NO.shape[1], a_NI.shape[1])
    return Use(rule.summarize(shape, a_NI, g_NO), torch.tensor(float(len(a_NI)), dtype=a_NI.dtype), opposite)


def one_use(rule, seed=0, dtype=torch.float64):
    return use(rule, randn(ROWS, IN, seed=seed, dtype=dtype), randn(ROWS, OUT, seed=seed + 500, dtype=dtype))


def zero_use(rule):
    return use(rule, torch.zeros(ROWS, IN).double(), torch.zeros(ROWS, OUT).double())


def fresh(rule, shape=SHAPE):
    return rule.init(shape, torch.device("cpu"))


def mkor(**options):
    """A rule in float64, at a factor momentum that makes differences large."""
    return MKOR.published(**{"factor_dtype": torch.float64, "gamma": 0.95} | options)


def vector_pairs(uses):
    """``(g_O, a_I)`` pairs, one for each use, as they lie along the two sides."""
    pairs = [(u.summary[1], u.summary[0] / u.rows, u.opposite) for u in uses]
    return [(a, g) if opposite else (g, a) for g, a, opposite in pairs]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("statistic", ("mean", "gradient", "mean+gradient"))
@pytest.mark.parametrize("form", PUBLISHED)
def test_state_keeps_shapes_and_dtypes(form, statistic, bias):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rule = MKOR.published(form=form, statistic=statistic, bias=bias, factor_dtype=dtype)
        state, grad = fresh(rule), gradient(torch.float32)
        described = {name: (t.shape, t.dtype) for name, t in state.items()}
        assert described == {"L": ((OUT, OUT), dtype), "R": ((IN + (bias == "joint"),) * 2, dtype)}
        state = rule.update(state, [one_use(rule, dtype=torch.float32)], grad, STEP)
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == described
        direction = rule.precondition(state, grad)
        assert [(t.shape, t.dtype) for t in direction] == [(t.shape, t.dtype) for t in grad]
        assert not torch.equal(direction.weight, grad.weight)


@pytest.mark.parametrize("opposite", [False, True])
def test_exact_is_the_inverse_of_the_moving_average(opposite):
    rule = mkor(form="exact", epsilon=math.inf, gamma=0.9)
    state, averages = fresh(rule), {"L": torch.eye(OUT).double(), "R": torch.eye(IN).double()}
    for t in range(60):
        uses = [one_use(rule, seed=t)]
        if opposite:
            uses.append(use(rule, randn(ROWS, OUT, seed=t + 1000), randn(ROWS, IN, seed=t + 2000), opposite=True))
        state = rule.update(state, uses, gradient(), torch.tensor(t))
        for side, name in enumerate("LR"):
            vectors = [pair[side] for pair in vector_pairs(uses)]
            outer = sum(torch.outer(v, v) for v in vectors) / len(vectors)
            averages[name] = rule.gamma * averages[name] + (1 - rule.gamma) * outer
    for name, average in averages.items():
        expected = torch.linalg.inv(average)
        assert (state[name] - expected).norm() / expected.norm() < 1e-10


@pytest.mark.parametrize("gamma, kappa", [(0.95, 10.0), (0.6, 100.0), (0.99, 0.1)])
def test_scale_free_keeps_eigenvalues_in_their_bounds(gamma, kappa):
    rule = mkor(form="scale_free", gamma=gamma, kappa=kappa)
    state, lowest = fresh(rule), (1 - gamma) / (1 + kappa * (1 - gamma))
    for t in range(400):
        state = rule.update(state, [one_use(rule, seed=t if t < 200 else 0)], gradient(), STEP)  # then always the same
        if t % 20 == 0 or t == 399:
            for factor in state.values():
                values = torch.linalg.eigvalsh(factor)
                assert lowest - 1e-12 <= values.min() and values.max() <= 1 + 1e-12
    assert values.min() < 0.9, "the factor never left the identity"


@pytest.mark.parametrize("statistic", ("mean", "gradient", "mean+gradient"))
def test_scale_free_does_not_see_the_scale_of_the_gradients(statistic):
    rule, a_NI, g_NO = mkor(statistic=statistic), randn(ROWS, IN), randn(ROWS, OUT, seed=1)
    reference_state = rule.update(fresh(rule), [use(rule, a_NI, g_NO)], gradient(), STEP)
    for scale in (1e-6, 3.0, 1e6):
        grad = Gradient(*(g * scale for g in gradient()))
        state = rule.update(fresh(rule), [use(rule, a_NI, g_NO * scale)], grad, STEP)
        for name, factor in state.items():
            torch.testing.assert_close(factor, reference_state[name], rtol=1e-12, atol=1e-12)


STATISTIC_KINDS = {"random": 1.0, "zero": 0.0, "constant": 1.0, "huge": 1e4, "tiny": 1e-8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STATISTIC_KINDS)
def test_ten_thousand_updates_stay_finite_and_positive_definite(kind, dtype):
    rule, scale = MKOR.published(factor_dtype=dtype), STATISTIC_KINDS[kind]
    rows_a, rows_g = randn(64, 2, IN, dtype=torch.float32), randn(64, 2, OUT, dtype=torch.float32, seed=1)
    uses = [use(rule, a * scale, g * scale) for a, g in zip(rows_a, rows_g)]
    uses = uses[:1] if kind == "constant" else uses
    state, grad = fresh(rule), gradient(torch.float32)
    for t in range(10_000):
        state = rule.update(state, [uses[t % len(uses)]], grad, STEP)
        if t % 1000 == 999:
            for factor in state.values():
                wide = factor.double()
                assert wide.isfinite().all()
                assert torch.linalg.eigvalsh((wide + wide.T) / 2).min() > 0
                assert (wide - wide.T).abs().max() <= 2 * torch.finfo(dtype).eps


def test_zero_statistics_only_forget():
    for form, stays in (("scale_free", 1.0), ("forgetful", 1.0), ("exact", 1 / 0.95), ("paper", 0.95)):
        rule = mkor(form=form)
        state = rule.update(fresh(rule), [zero_use(rule)], gradient(), STEP)
        torch.testing.assert_close(state["L"], stays * torch.eye(OUT).double(), rtol=1e-14, atol=0)


def test_stabiliser_pulls_towards_the_identity_where_an_entry_exceeds_epsilon():
    rule = mkor(form="exact", epsilon=10.0, zeta=0.25)
    off = mkor(form="exact", epsilon=math.inf)
    uses, grad = [one_use(rule)], gradient()
    root = randn(OUT, OUT)
    factor = root @ root.T + 0.1 * torch.eye(OUT).double()
    for largest, fires in ((9.99, False), (10.01, True)):
        state = {"L": factor * (largest / factor.max())}
        pulled = {"L": 0.25 * state["L"] + 0.75 * torch.eye(OUT).double()}
        expected = off.update(pulled if fires else state, uses, grad, STEP)["L"]
        torch.testing.assert_close(rule.update(state, uses, grad, STEP)["L"], expected, rtol=1e-12, atol=1e-12)
    huge = {"L": 1e30 * torch.eye(OUT).double()}
    zero = [zero_use(rule)]
    torch.testing.assert_close(off.update(huge, zero, grad, STEP)["L"], huge["L"] / 0.95)
    assert [MKOR.published(form=form).stabiliser_threshold for form in PUBLISHED] == [math.inf, math.inf, 1000.0, 1000.0]


def test_exact_with_its_stabiliser_stays_finite_in_half_precision():
    rule = MKOR.published(form="exact", factor_dtype=torch.float16)
    state, grad, uses = fresh(rule), gradient(torch.float32), [one_use(rule, dtype=torch.float32)]
    for _ in range(1000):  # without it, unseen directions overflow near update 200
        state = rule.update(state, uses, grad, STEP)
    assert all(factor.isfinite().all() and factor.max() <= 1000 / 0.95 * 1.01 for factor in state.values())


@pytest.mark.parametrize("form", PUBLISHED)
def test_one_update_is_the_printed_formula(form):
    rule = mkor(form=form, gamma=0.9, epsilon=math.inf, kappa=3.0)
    root = randn(OUT, OUT, seed=5)
    F = root @ root.T / OUT + torch.eye(OUT).double()
    uses = [one_use(rule)]
    (v, _), = vector_pairs(uses)
    actual = rule.update({"L": F}, uses, gradient(), STEP)["L"]
    if form == "paper":
        u = F @ v
        expected = 0.9 * F + 0.1 / (0.9**2 * (1 + 0.9 * 0.1 * v @ u)) * torch.outer(u, u)
    elif form == "exact":
        u = F @ v
        expected = F / 0.9 - 0.1 / (0.9**2 * (1 + 0.1 / 0.9 * v @ u)) * torch.outer(u, u)
    else:
        v = v * (3.0**0.5 / v.norm()) if form == "scale_free" else v
        B = 0.9 * F + 0.1 * torch.eye(OUT).double()
        expected = B - torch.outer(B @ v, B @ v) / (1 + v @ B @ v)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
