"""Every parameter and every factor, every step, beside an eager reference that is obviously right."""

import copy

import pytest
import torch
import zoo
from reference import Reference

import mkor_fx
from mkor_fx import MKOR

STEPS = 20


def relative(value, reference):
    return ((value - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def reference_for(model, rule, optimizer, **options):
    return Reference(
        model, optimizer, form=rule.form, statistic=rule.statistic, gamma=rule.gamma, kappa=rule.kappa,
        epsilon=rule.stabiliser_threshold, zeta=rule.pull, rescale=rule.rescale, bias=rule.bias, clamp=rule.clamp,
        max_factor=rule.max_factor, factor_dtype=rule.factor_dtype, **options,
    )


def lockstep(name, rule, backend, tolerance, door, optimizer=torch.optim.AdamW, refresh_every=1, **model_options):
    """Train a zoo model through ``door`` and by the reference; hold them together at every step."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    model, loss_fn, batches = zoo.build(name, dtype=dtype, steps=STEPS, **model_options)
    twin = copy.deepcopy(model)
    own, other = optimizer(model.parameters(), lr=1e-3), optimizer(twin.parameters(), lr=1e-3)
    reference = reference_for(twin, rule, other, refresh_every=refresh_every)
    options = {"refresh_every": refresh_every, "backend": backend}
    if door == "step":
        step = mkor_fx.compile_step(model, loss_fn, own, rule, **options)
        mkor = step.mkor
    else:
        compiled = mkor_fx.compile(model, rule, **options)
        mkor = compiled.mkor

        def step(x, y):
            own.zero_grad()
            loss = loss_fn(compiled(x), y)
            loss.backward()
            own.step()
            return loss.detach()

    for x, y in batches:
        loss = step(x, y)
        expected = loss_fn(twin(x), y)
        expected.backward()
        reference.step()
        assert relative(loss, expected.detach()) <= tolerance
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert relative(p.detach(), q.detach()) <= tolerance, key
        for (key, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert relative(b.double(), c.double()) <= tolerance, key
        state = mkor.state_dict()
        assert state.keys() - {"step"} == reference.state.keys()
        for key, factor in reference.state.items():
            assert relative(state[key], factor) <= tolerance, key
    assert mkor.step == STEPS


@pytest.mark.parametrize("door", ["step", "drop-in"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "checkpointed"])
def test_default_rule(name, door):
    lockstep(name, MKOR.published(factor_dtype=torch.float64), "eager", 1e-10, door)


def test_six_blocks_with_a_graph_break_in_each_have_six_sets_of_factors():
    lockstep("breaks", MKOR.published(factor_dtype=torch.float64), "eager", 1e-10, "drop-in")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"form": "exact", "epsilon": 3.0}),
        ("cnn", {"form": "paper", "epsilon": 50.0, "zeta": 0.3}),
        ("gpt", {"form": "forgetful", "bias": "joint", "clamp": 0.5}),
        ("gpt", {"statistic": "mean+gradient", "bias": "joint"}),
        ("cnn", {"statistic": "gradient", "bias": "off", "rescale": False}),
        ("gpt", {"max_factor": 24, "gamma": 0.8, "kappa": 3.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_options(name, options):
    lockstep(name, MKOR.published(factor_dtype=torch.float64, **options), "eager", 1e-10, "step")


def test_clamp_and_sketch_through_the_drop_in_door():
    rule = MKOR.published(factor_dtype=torch.float64, statistic="mean+gradient", clamp=2.0)
    lockstep("gpt", rule, "eager", 1e-10, "drop-in")


@pytest.mark.parametrize("door", ["step", "drop-in"])
def test_refresh_every_third_step(door):
    lockstep("cnn", MKOR.published(factor_dtype=torch.float64), "eager", 1e-10, door, torch.optim.SGD, refresh_every=3)


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize("name", ["cnn", *(pytest.param(name, marks=NIGHTLY) for name in ("mlp", "gpt"))])
def test_compiled_step_in_float32(name):
    lockstep(name, MKOR.published(), "inductor", 1e-4, "step")


@pytest.mark.parametrize("name", ["cnn", pytest.param("breaks", marks=NIGHTLY)])
def test_compiled_drop_in_in_float32(name):
    lockstep(name, MKOR.published(), "inductor", 1e-4, "drop-in")
