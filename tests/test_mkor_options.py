"""The MKOR rule's options: what each changes, and what is refused."""

import math
import re

import pytest
import reference
import torch
from test_mkor import IN, OUT, ROWS, SHAPE, STEP, fresh, gradient, mkor, one_use, randn, use
from torch import nn

import mkor_fx
from mkor_fx.rules import MKOR, Gradient, Shape
from mkor_fx.rules.mkor_options import BIASES, PUBLISHED


def scaled_to(direction, grad):
    return direction * grad.norm() / direction.norm()


def spd(size, seed=0):
    root = randn(size, size, seed=seed)
    return root @ root.T / size + torch.eye(size).double()


def test_bias_left_is_preconditioned_by_the_left_factor_with_norms_of_its_own():
    state, grad = {"L": spd(OUT), "R": spd(IN)}, gradient()
    weight, bias = mkor(bias="left").precondition(state, grad)
    torch.testing.assert_close(weight, scaled_to(state["L"] @ grad.weight @ state["R"], grad.weight))
    torch.testing.assert_close(bias, scaled_to(state["L"] @ grad.bias, grad.bias))
    without_left = mkor(bias="left").precondition({"R": state["R"]}, grad)
    assert torch.equal(without_left.bias, grad.bias)


def test_bias_joint_is_one_more_column():
    rule, grad = mkor(bias="joint"), gradient()
    state = {"L": spd(OUT), "R": spd(IN + 1)}
    joined = torch.cat([grad.weight, grad.bias[:, None]], 1)
    expected = scaled_to(state["L"] @ joined @ state["R"], joined)
    direction = rule.precondition(state, grad)
    torch.testing.assert_close(torch.cat([direction.weight, direction.bias[:, None]], 1), expected)
    a_NI, g_NO = randn(ROWS, IN), randn(ROWS, OUT, seed=1)
    exact = mkor(bias="joint", form="exact", epsilon=math.inf)
    ones = torch.cat([a_NI.mean(0), torch.ones(1).double()])
    average = 0.95 * torch.eye(IN + 1).double() + 0.05 * torch.outer(ones, ones)
    state = exact.update(fresh(exact), [use(exact, a_NI, g_NO)], grad, STEP)
    torch.testing.assert_close(state["R"], torch.linalg.inv(average), rtol=1e-12, atol=1e-12)
    assert fresh(rule, Shape(OUT, IN, bias=False))["R"].shape == (IN, IN)


def test_bias_off_stays_raw():
    grad = gradient()
    assert torch.equal(mkor(bias="off").precondition({"L": spd(OUT), "R": spd(IN)}, grad).bias, grad.bias)


def test_sides_above_max_factor_stay_the_identity():
    grad, R = gradient(), spd(IN)
    assert list(fresh(MKOR.published(max_factor=OUT))) == ["L"]
    assert list(fresh(MKOR.published(max_factor=IN))) == ["L", "R"]
    assert list(fresh(MKOR.published(max_factor=IN, bias="joint"))) == ["L"], "the bias column counts"
    assert fresh(MKOR.published(max_factor=OUT - 1)) == fresh(MKOR.published(max_factor=0)) == {}
    rule = mkor(max_factor=OUT)
    assert list(rule.update(fresh(rule), [one_use(rule)], grad, STEP)) == ["L"]
    direction = rule.precondition({"R": R}, grad).weight
    torch.testing.assert_close(direction, scaled_to(grad.weight @ R, grad.weight))


def test_clamp_bounds_the_entries_of_every_row_before_they_are_summed():
    rule, free = mkor(clamp=0.5), mkor()
    a_NI, g_NO = randn(ROWS, IN), 3 * randn(ROWS, OUT, seed=1)
    expected = free.summarize(SHAPE, a_NI.clamp(-0.5, 0.5), g_NO.clamp(-0.5, 0.5))
    for actual, want, unclamped in zip(rule.summarize(SHAPE, a_NI, g_NO), expected, free.summarize(SHAPE, a_NI, g_NO)):
        assert torch.equal(actual, want) and not torch.equal(actual, unclamped)


def test_rescale_keeps_norms_and_survives_a_zero_gradient():
    state, grad = {"L": spd(OUT), "R": spd(IN)}, gradient()
    zero = Gradient(torch.zeros(OUT, IN).double(), torch.zeros(OUT).double())
    for direction, raw in zip(mkor().precondition(state, grad), grad):
        torch.testing.assert_close(direction.norm(), raw.norm())
    raw = mkor(rescale=False).precondition(state, grad)
    torch.testing.assert_close(raw.weight, state["L"] @ grad.weight @ state["R"])
    torch.testing.assert_close(raw.bias, state["L"] @ grad.bias)
    for rescale in (True, False):
        assert all((part == 0).all() for part in mkor(rescale=rescale).precondition(state, zero))


@pytest.mark.parametrize("statistic", ("mean", "gradient", "mean+gradient"))
@pytest.mark.parametrize("form", PUBLISHED)
def test_unscale_gives_the_summary_of_unscaled_gradients(form, statistic):
    rule, a_NI, g_NO = mkor(form=form, statistic=statistic), randn(ROWS, IN), randn(ROWS, OUT, seed=1)
    scale = torch.tensor(65536.0).double()
    unscaled = rule.unscale(rule.summarize(SHAPE, a_NI, g_NO * scale), scale)
    for actual, expected in zip(unscaled, rule.summarize(SHAPE, a_NI, g_NO), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_gradient_statistic_is_an_unbiased_sketch_of_both_sides():
    rule, grad = mkor(statistic="gradient", form="forgetful"), gradient()
    outer = {"L": torch.zeros(OUT, OUT).double(), "R": torch.zeros(IN, IN).double()}
    steps = 4000
    for t in range(steps):
        signs_I = reference.rademacher(t, 0, IN).double()
        signs_O = reference.rademacher(t, 1, OUT).double()
        vectors = {"L": grad.weight @ signs_I, "R": grad.weight.T @ signs_O}
        for name, v in vectors.items():
            outer[name] += torch.outer(v, v) / steps
        if t < 5:
            state = rule.update(fresh(rule), [], grad, torch.tensor(t))
            for name, v in vectors.items():
                expected = torch.linalg.inv(torch.eye(len(v)).double() + torch.outer(v, v))
                torch.testing.assert_close(state[name], expected, rtol=1e-10, atol=1e-10)
    for name, expected in (("L", grad.weight @ grad.weight.T), ("R", grad.weight.T @ grad.weight)):
        assert (outer[name] - expected).norm() < 0.1 * expected.norm()


def test_both_statistics_share_the_weight():
    rule = mkor(statistic="mean+gradient", form="exact", epsilon=math.inf)
    grad, uses = gradient(), [one_use(rule)]
    mean, sketch = uses[0].summary[1], grad.weight @ reference.rademacher(0, 0, IN).double()
    average = 0.95 * torch.eye(OUT).double() + 0.025 * (torch.outer(mean, mean) + torch.outer(sketch, sketch))
    actual = rule.update(fresh(rule), uses, grad, STEP)["L"]
    torch.testing.assert_close(actual, torch.linalg.inv(average), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_are_rounding_only_forget(dtype):
    rule = MKOR.published(gamma=0.95)
    a_NI = randn(256, IN).to(dtype)
    g_NO = randn(128, OUT).to(dtype)
    g_NO = torch.cat([g_NO, -g_NO])[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    rounding = torch.finfo(dtype).eps * randn(256, OUT, seed=3).clamp(-1, 1)
    g_NO = (g_NO.double() * (1 + rounding)).to(dtype)
    assert g_NO.float().sum(0).abs().max() > 0
    state = {"L": spd(OUT).float() / 8, "R": spd(IN).float() / 8}
    new = rule.update(state, [use(rule, a_NI, g_NO)], gradient(torch.float32), STEP)
    torch.testing.assert_close(new["L"], 0.95 * state["L"] + 0.05 * torch.eye(OUT))
    assert (new["R"] - (0.95 * state["R"] + 0.05 * torch.eye(IN))).norm() > 0.1, "the other side has a statistic"


def test_layer_in_front_of_a_batch_norm_keeps_its_left_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, nn.functional.cross_entropy, optimizer, MKOR.published(), backend="eager")
    for _ in range(5):
        step(torch.randn(32, 3, 6, 6) + 1, torch.randint(0, 5, (32,)))
    state = step.mkor.state_dict()
    torch.testing.assert_close(state["0.weight.L"], torch.eye(6))
    assert (state["0.weight.R"] - torch.eye(27)).norm() > 0.5
    assert (state["4.weight.L"] - torch.eye(5)).norm() > 0.1


BAD = [
    ("gamma", 0.0), ("gamma", 1.0), ("gamma", -0.1), ("gamma", 1.5), ("gamma", math.nan),
    ("zeta", 0.99), ("zeta", 1.0), ("zeta", -0.1), ("zeta", math.nan),
    ("kappa", 0.0), ("kappa", -1.0), ("kappa", math.nan), ("kappa", math.inf),
    ("epsilon", 0.0), ("epsilon", -1.0), ("clamp", 0.0), ("clamp", -1.0),
    ("max_factor", -1), ("form", "fast"), ("statistic", "median"), ("bias", True),
    ("factor_dtype", torch.int32), ("factor_dtype", "bfloat16"), ("factor_dtype", torch.complex64),
]  # fmt: skip


@pytest.mark.parametrize("option, value", BAD)
def test_bad_option_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=re.escape(f"MKOR({option}={value!r})")):
        (MKOR.published if option in ("zeta", "epsilon") else MKOR)(**{option: value})


def test_good_options_are_taken():
    for options in ({"bias": bias} for bias in BIASES):
        one, other = MKOR.published(**options), MKOR.published(**options)
        assert one == other and hash(one) == hash(other)
    assert MKOR.published(epsilon=math.inf, zeta=0.0, clamp=100.0, max_factor=0).max_factor == 0
    with pytest.raises(AttributeError):
        MKOR.published().gamma = 0.5
    with pytest.raises(TypeError):
        MKOR("exact")
