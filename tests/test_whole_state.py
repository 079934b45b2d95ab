"""One checkpoint of model, optimizers and factors; what is said where a run is resumed without its factors."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR

SAID = r"AdamW has stepped these parameters before, and the factors start afresh.*mkor\.load_state_dict before"


def build(rule=MKOR(), several=False, optimizer=torch.optim.AdamW):  # noqa: B008
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    params = [*model.parameters()]
    optimizers = (
        [optimizer(params[:2], lr=0.01), torch.optim.SGD(params[2:], lr=0.1)] if several else optimizer(params, lr=0.01)
    )
    return mkor_fx.compile_step(model, mse_loss, optimizers, rule, refresh_every=2, backend="eager")


def train(step, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        step(torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator))
    return copy.deepcopy(step.state_dict())


def leaves(state):
    return [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("rule", [MKOR(), KFAC(derive_every=2), None], ids=["mkor", "kfac", "none"])
def test_a_run_goes_on_as_if_it_had_not_stopped(rule, several):
    step, again = build(rule, several), build(rule, several)
    saved = train(step, range(3))
    assert set(saved) == {"model", "optimizer", "mkor"} and isinstance(saved["optimizer"], list) == several
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(saved)
        whole, resumed = train(step, range(3, 7)), train(again, range(3, 7))
    assert len(leaves(whole)) == len(leaves(resumed)) > 8
    assert all(map(torch.equal, leaves(whole), leaves(resumed)))


def test_a_file_without_factors_starts_them_afresh_and_says_so_once():
    step, again = build(), build()
    saved = train(step, range(3))
    del saved["mkor"]
    with pytest.warns(UserWarning, match="the checkpoint has no factors: they start afresh") as said:
        again.load_state_dict(saved)
    assert len(said) == 1 and again.mkor.step == 0
    assert all(map(torch.equal, again.model.state_dict().values(), saved["model"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("0.bias"), r"another model's: 0\.bias is missing\. With strict=False"),
        (lambda s: s["model"].update({"2.weight": torch.ones(2, 2)}), r"2\.weight is \[2, 2\], here \[3, 5\]"),
        (lambda s: s["model"].update(head=torch.ones(2)), r"head is not the model's"),
        (
            lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
            r"groups of \[3\] parameters, AdamW has groups of \[4\]",
        ),
        (lambda s: s.update(optimizer=[s["optimizer"]] * 2), r"the state is of 2 optimizers, the step has 1"),
        (lambda s: s.pop("optimizer"), r"must be a dict with model, optimizer and mkor.*; this one has model, mkor"),
        (lambda s: s["mkor"].update({"0.weight.L": torch.eye(2)}), r"0\.weight\.L: loaded \(2, 2\), here \(5, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused_whole(change, message):
    step = build()
    saved = train(step, range(2))
    before = train(step, range(2, 3))
    change(saved)
    with pytest.raises(ValueError, match=message):
        step.load_state_dict(saved)
    assert all(map(torch.equal, leaves(before), leaves(step.state_dict())))
    with pytest.raises(ValueError, match="this one is a NoneType"):
        step.load_state_dict(None)


def test_how_they_look():
    step = build()
    assert (
        repr(step)
        == "CompiledStep(Sequential, AdamW, programs: none yet, FactorState(step 0, 0 weights, 0.0 MiB, refresh every 2))"
    )
    train(step, range(2))
    assert "programs: refresh, reuse, FactorState(step 2, 2 weights" in repr(step)


# ---- resumed without factors --------------------------------------------------------------------------------------------


def drop_in(optimizer=torch.optim.AdamW, precondition="step"):
    torch.manual_seed(0)
    rule = MKOR() if precondition == "step" else MKOR.published()
    model = mkor_fx.compile(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), rule, precondition=precondition, backend="eager")
    return model, optimizer(model.parameters(), lr=0.01)


def loop(model, optimizer, steps=2):
    for _ in range(steps):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("precondition", ["step", "backward"])
def test_the_drop_in_door_says_that_a_resumed_run_has_fresh_factors(precondition):
    model, optimizer = drop_in(precondition=precondition)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(model, optimizer)
        again, other = drop_in(precondition=precondition)
        other.load_state_dict(optimizer.state_dict())
        again.load_state_dict(model.state_dict())
        again.mkor.load_state_dict(model.mkor.state_dict())
        loop(again, other)
    again, other = drop_in(precondition=precondition)
    other.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match=SAID) as said:
        loop(again, other)
    assert len(said) == 1


def test_so_does_a_compiled_step():
    step, again = build(), build()
    train(step, range(2))
    again.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    with pytest.warns(UserWarning, match=SAID) as said:
        train(again, range(2))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = build(None)
        plain.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        train(plain, range(1))
        loop(*drop_in(torch.optim.Adagrad))  # whose state is there from the start
