"""A NaN reaches no factor and, through the whole step, no parameter; the next clean batch trains on."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR


def model_and_batches():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    batches = [(torch.randn(6, 2, 6, 6), torch.randint(0, 5, (6,))) for _ in range(4)]
    return model, batches


def poisoned(value):
    x = torch.randn(6, 2, 6, 6)
    x[1, 0, 2, 3] = value
    return x


def snapshot(*holders):
    return [{key: value.clone() for key, value in holder.items()} for holder in holders]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("rule", [MKOR.published(), MKOR.published(form="exact", statistic="mean+gradient"), None], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whole_step_changes_nothing_at_all(rule, value):
    model, batches = model_and_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, rule, backend="eager")
    for x, y in batches[:2]:
        step(x, y)
    before = snapshot(model.state_dict(), step.mkor.state_dict(), *optimizer.state.values())
    loss = step(poisoned(value), batches[0][1])
    assert not torch.isfinite(loss) and step.skipped == 1
    after = snapshot(model.state_dict(), step.mkor.state_dict(), *optimizer.state.values())
    for one, other in zip(before, after, strict=True):
        one.pop("step", None), other.pop("step", None)
        assert same(one, other)
    assert torch.isfinite(step(*batches[2])) and step.skipped == 1
    assert not same(before[0], model.state_dict())
    if rule is not None:
        assert not same(before[1], {k: v for k, v in step.mkor.state_dict().items() if k != "step"})


def test_without_skipping_factors_are_still_guarded():
    model, batches = model_and_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, backend="eager", skip_nonfinite=False)
    step(*batches[0])
    before = step.mkor.state_dict()
    step(poisoned(float("nan")), batches[0][1])
    after = step.mkor.state_dict()
    assert before.pop("step") != after.pop("step") and same(before, after)
    assert not all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("statistic", ["mean", "mean+gradient"])
def test_drop_in_door_leaves_the_parameters_to_the_optimizer(statistic):
    model, batches = model_and_batches()
    compiled = mkor_fx.compile(model, MKOR.published(statistic=statistic), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def train(x, y, step=True):
        optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        if step:
            optimizer.step()

    train(*batches[0])
    clean, before = snapshot(model.state_dict(), compiled.mkor.state_dict())
    train(poisoned(float("nan")), batches[1][1])
    after = compiled.mkor.state_dict()
    assert before.pop("step") != after.pop("step") and same(before, after)
    assert not all(torch.isfinite(p).all() for p in model.parameters())
    model.load_state_dict(clean)
    train(*batches[2])
    assert all(torch.isfinite(t).all() for t in compiled.mkor.state_dict().values())
    assert not torch.equal(compiled.mkor.state_dict()["0.weight.R"], before["0.weight.R"])


@pytest.mark.nightly
def test_compiled_guard():
    model, batches = model_and_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer)
    step(*batches[0])
    before = snapshot(model.state_dict(), step.mkor.state_dict())
    step(poisoned(float("nan")), batches[0][1])
    after = snapshot(model.state_dict(), step.mkor.state_dict())
    before[1].pop("step"), after[1].pop("step")
    assert all(map(same, before, after))
    step(*batches[1])
    assert not same(before[0], model.state_dict())
