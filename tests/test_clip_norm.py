"""Clipping inside of the program, beside torch's own in a loop."""

import processes
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR, Communication

BOUND = 2.0
RULES = {
    "none": None,
    "mkor": MKOR(statistic="gradient", factor_dtype=torch.float64),
    "published": MKOR.published(factor_dtype=torch.float64),
    "kfac": KFAC(damping=0.1, derive_every=2),
}


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    scales = (0.01, 1.0, 10.0, 1.0, 3.0)  # some are clipped, some are not
    return model, [(torch.randn(8, 6).double(), s * torch.randn(8, 3).double()) for s in scales]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def in_a_loop(rule):
    """By the drop-in door, or plain torch: weights in the end, and the norms."""
    model, batches = build()
    called = model if rule is None else mkor_fx.compile(model, rule, backend="eager")
    optimizer, norms = adamw(model), []
    for x, y in batches:
        optimizer.zero_grad()
        mse_loss(called(x), y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), BOUND)))
        optimizer.step()
    return weights(model), norms


def compiled(rule, rank=0, size=1, **options):
    model, batches = build()
    options = {"backend": "eager", "clip_norm": BOUND, "communication": Communication(padding=9.0), **options}
    step, norms = mkor_fx.compile_step(model, mse_loss, adamw(model), rule, **options), []
    for x, y in batches:
        step(x.chunk(size)[rank], y.chunk(size)[rank])
        norms.append(step.metrics()["gradient_norm"])
    return weights(model), norms


def on_a_rank(rank, size, name, placement):
    return compiled(RULES[name], rank, size, placement=placement)


def same(found, expected):
    assert expected[1] == pytest.approx(found[1], rel=1e-6)
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", RULES)
def test_it_clips_as_torch_does(name):
    expected = in_a_loop(RULES[name])
    assert min(expected[1]) < BOUND < max(expected[1])
    same(compiled(RULES[name]), expected)
    assert (in_a_loop(RULES[name])[0]["0.weight"] - compiled(RULES[name], clip_norm=1e9)[0]["0.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "size", "placement"),
    [("none", 2, "replicated"), ("kfac", 2, "owner"), pytest.param("published", 4, 0.5, marks=pytest.mark.nightly)],
)
def test_ranks_clip_by_the_norm_of_the_whole(name, size, placement):
    for found in processes.values(on_a_rank, size, name, placement):
        same(found, in_a_loop(RULES[name]))


def test_a_norm_that_is_not_finite_changes_nothing():
    model, batches = build()
    step = mkor_fx.compile_step(model, mse_loss, adamw(model), MKOR(), clip_norm=BOUND, backend="eager")
    step(*batches[0])
    before = weights(model)
    step(batches[1][0] * torch.inf, batches[1][1])
    assert step.skipped == 1 and not step.metrics()["gradient_norm"] < torch.inf
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    step(*batches[1])
    assert step.skipped == 1 and not any(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_half_precision_and_inductor():
    torch.manual_seed(0)
    results = []
    for backend in ("eager", "inductor"):
        model = build()[0].to(torch.bfloat16)
        step = mkor_fx.compile_step(model, mse_loss, adamw(model), None, clip_norm=BOUND, backend=backend)
        for x, y in build()[1]:
            step(x.bfloat16(), y.bfloat16())
        results.append((weights(model), step.metrics()["gradient_norm"]))
    assert results[0][1] == pytest.approx(results[1][1], rel=0.05)
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], tensor, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("wrong", [0, -1.0, True, "1.0"])
def test_a_bound_is_positive(wrong):
    model = build()[0]
    with pytest.raises(ValueError, match=r"clip_norm=.*: must be positive, the largest norm of all gradients together"):
        mkor_fx.compile_step(model, mse_loss, adamw(model), clip_norm=wrong)
