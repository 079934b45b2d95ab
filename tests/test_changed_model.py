"""A model that changes while it is trained is looked at again: planned anew with one message, or refused; and what was saved
of another stage of it loads as far as it fits."""

import copy
import warnings

import pytest
import torch
from test_hooks import RULE, close
from test_lockstep import reference_for
from torch import nn
from torch.nn import functional

import mkor_fx


class Net(nn.Module):
    def __init__(self, outputs=4):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def build(outputs=4):
    torch.manual_seed(0)
    return Net(outputs).double()


class Training:
    """One of the doors over a model, with SGD; ``said`` is what the library has warned of."""

    def __init__(self, door, model, optimizer=torch.optim.SGD, rule=RULE):
        self.model, self.said = model, []
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if door == "compile_step":
            self.compiled = mkor_fx.compile_step(model, functional.cross_entropy, self.optimizer, rule, backend="eager")
        else:
            mode = "backward" if door == "backward" else "step"
            self.compiled = mkor_fx.compile(model, rule, precondition=mode, backend="eager")
        self.whole = door == "compile_step"

    def step(self, x, y):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if self.whole:
                self.compiled(x, y)
            else:
                self.optimizer.zero_grad()
                functional.cross_entropy(self.compiled(x), y).backward()
                self.optimizer.step()
        self.said += [str(warning.message) for warning in said if "mkor_fx" in str(warning.message)]

    def hold(self, params):
        self.optimizer.param_groups[0]["params"] = list(params)


def batch(classes=4):
    return torch.randn(16, 8, dtype=torch.float64), torch.randint(0, classes, (16,))


BOTH = pytest.mark.parametrize("door", ["compile_step", "compile"])
ALL = pytest.mark.parametrize("door", ["compile_step", "compile", "backward"])


def follow(training, data, reference, twin):
    """Hold a training to the reference of a twin."""
    for x, y in data:
        training.step(x, y)
        functional.cross_entropy(twin(x), y).backward()
        reference.step()
        close(training.model, twin, 1e-9)


@ALL
def test_a_new_head_of_another_width_starts_afresh_and_is_said_once(door):
    training = Training(door, build())
    for _ in range(2):
        training.step(*batch())
    before = training.compiled.mkor.state_dict()
    training.model.head = nn.Linear(8, 10).double()
    training.hold(training.model.parameters())
    for _ in range(3):
        training.step(*batch(10))
    after = training.compiled.mkor.state_dict()
    assert before["head.weight.L"].shape == (4, 4) and after["head.weight.L"].shape == (10, 10)
    assert not torch.equal(after["first.weight.L"], before["first.weight.L"]) and after["step"] >= 4
    changed = [text for text in training.said if "has changed since" in text]
    assert len(changed) == 1 and "head" in changed[0] and "compiled again" in changed[0]
    (fresh,) = [text for text in training.said if "fresh factors" in text]
    assert "head.weight" in fresh and "first" not in fresh


@BOTH
def test_a_replaced_weight_keeps_the_factors_of_its_name(door):
    """As ``load_state_dict(assign=True)`` does to all of them: an optimizer over the new ones goes on where it was."""
    model, twin = build(), build()
    training = Training(door, model)
    reference = reference_for(twin, RULE, torch.optim.SGD(twin.parameters(), lr=0.1))
    follow(training, [batch(), batch()], reference, twin)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    training.hold(model.parameters())
    follow(training, [batch(), batch()], reference, twin)
    assert len(training.said) == 1 and training.compiled.mkor.step == 4


def test_assigned_state_that_the_optimizer_does_not_know_is_refused_as_at_the_beginning():
    training = Training("compile_step", build())
    training.step(*batch())
    before = copy.deepcopy(training.optimizer.state_dict())
    training.model.load_state_dict({name: t.clone() for name, t in training.model.state_dict().items()}, assign=True)
    values = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"6 of the optimizer's 6 parameters are not this model's.*replaced\?"):
            training.step(*batch())
    assert all(torch.equal(p, value) for p, value in zip(training.model.parameters(), values, strict=True))
    assert copy.deepcopy(training.optimizer.state_dict()).keys() == before.keys() and training.compiled.mkor.step == 1


@BOTH
@pytest.mark.parametrize("how", ["tied", "untied"])
def test_ties_made_and_cut_between_steps(door, how):
    """One parameter that is used twice has one set of factors and the sum of both gradients."""
    model, twin = build(), build()
    if how == "untied":
        for one in (model, twin):
            one.second.weight = one.first.weight
    training = Training(door, model)
    plain = Training(door, twin, rule=None) if door == "compile_step" else None
    training.step(*batch())
    if plain is not None:
        twin.load_state_dict(model.state_dict())
    model.second.weight = model.first.weight if how == "tied" else nn.Parameter(model.first.weight.detach().clone())
    training.hold(model.parameters())
    twin = copy.deepcopy(model)
    x, y = batch()
    training.step(x, y)
    functional.cross_entropy(twin(x), y).backward()
    own = 0.1 * twin.first.weight.grad.norm()  # the size that a direction has
    start = twin.first.weight.detach()
    torch.testing.assert_close((model.first.weight.detach() - start).norm(), own)
    keys = {key.rpartition(".")[0] for key in training.compiled.mkor.state_dict() if key != "step"}
    assert (model.second.weight is model.first.weight) == (how == "tied")
    assert "first.weight" in keys and sum("has changed since" in text for text in training.said) == 1
    assert how == "tied" or "second.weight" in keys


@ALL
def test_more_to_train_is_trained(door):
    """Layers that are thawed: Dynamo looks again, and they start with factors of their own."""
    model = build()
    model.first.requires_grad_(False)
    training = Training(door, model)
    training.step(*batch())
    assert "first.weight.L" not in training.compiled.mkor.state_dict()
    model.first.requires_grad_(True)
    training.hold(model.parameters())
    before = model.first.weight.detach().clone()
    for _ in range(2):
        training.step(*batch())
    assert "first.weight.L" in training.compiled.mkor.state_dict() and not torch.equal(model.first.weight, before)


@ALL
def test_a_layer_that_is_frozen_stays_as_it_is_and_is_said_once(door):
    training = Training(door, build())
    training.step(*batch())
    training.model.first.requires_grad_(False)
    training.optimizer.zero_grad()
    before = training.model.first.weight.detach().clone()
    for _ in range(2):
        training.step(*batch())
    assert torch.equal(training.model.first.weight, before) and len(training.said) == 1


@ALL
def test_a_model_that_does_not_change_is_not_looked_at_again(door):
    training = Training(door, build())
    for _ in range(3):
        training.step(*batch())
    training.model.eval(), training.model.train()
    training.model.load_state_dict(training.model.state_dict())
    for _ in range(2):
        training.step(*batch())
    assert training.said == []


@BOTH
def test_an_adapter_put_around_a_layer(door):
    """As peft does: the frozen layer inside, two small ones beside it."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False).double(), nn.Linear(2, 8, bias=False).double()

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    training = Training(door, build())
    training.step(*batch())
    training.optimizer.zero_grad()
    training.model.second = Adapted(training.model.second)
    training.hold(p for p in training.model.parameters() if p.requires_grad)
    for _ in range(2):
        training.step(*batch())
    state = training.compiled.mkor.state_dict()
    assert {"second.down.weight.L", "second.up.weight.R"} <= state.keys()
    assert not torch.equal(state["second.up.weight.L"], torch.eye(8).double())
    assert sum("has changed since" in text for text in training.said) == 1


# ---- what a compiled step cannot take over -------------------------------------------------------------------------------


HOOKS = ["register_hook", "register_post_accumulate_grad_hook"]


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_gradients_are_refused_whenever_they_come(kind, when):
    model = build()
    training = Training("compile_step", model)
    if when == "later":
        training.step(*batch())
    handle = getattr(model.second.weight, kind)(lambda *_: None)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"second\.weight has a hook on its gradient \({kind}\).*use mkor_fx\.compile"):
        training.step(*batch())
    with pytest.raises(ValueError, match=r"second\.weight has a hook"):
        Training("compile_step", model)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    handle.remove()
    training.step(*batch())
    assert not torch.equal(model.second.weight, before[2])


def test_step_hooks_of_the_optimizer_that_come_later_are_refused():
    training = Training("compile_step", build())
    training.step(*batch())
    training.optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"the optimizer has step hooks \(1\)"):
        training.step(*batch())


@BOTH
def test_in_the_other_door_hooks_act(door):
    if door == "compile_step":
        return
    training = Training(door, build())
    training.model.second.weight.register_hook(torch.zeros_like)
    before = training.model.second.weight.detach().clone()
    training.step(*batch())
    assert torch.equal(training.model.second.weight, before)


@pytest.mark.parametrize("when", ["before", "later"])
def test_parameters_that_share_memory_are_refused_by_name(when):
    model = build()
    training = Training("compile_step", model)
    if when == "later":
        training.step(*batch())
    model.second.weight.data = model.first.weight.data
    before = model.first.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"first\.weight and second\.weight share memory.*tie them as one"):
            training.step(*batch())
    assert torch.equal(model.first.weight, before)
    model.second.weight.data = model.second.weight.data.clone()
    training.step(*batch())
    assert not torch.equal(model.first.weight, before)


@pytest.mark.parametrize("apart", [True, False])
def test_parts_of_one_memory(apart):
    """As in a flat buffer for communication, or interleaved; and parts that do overlap."""
    model = build()
    flat = torch.randn(8, 16, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.data, model.second.weight.data = flat[:, :8], flat[:, 8:] if apart else flat[:, 7:15]
    training = Training("compile_step", model)
    if apart:
        training.step(*batch())
        assert model.first.weight.data_ptr() == flat.data_ptr()
        return
    with pytest.raises(ValueError, match="share memory"):
        training.step(*batch())


# ---- what was saved of another stage -------------------------------------------------------------------------------------


def stateful(door, outputs=4, frozen=(), steps=2):
    model = build(outputs)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    training = Training(door, model)
    for _ in range(steps):
        training.step(*batch(outputs))
    return training


@ALL
@pytest.mark.parametrize("warm", [False, True])
def test_a_state_without_a_part_lets_that_part_start_afresh_and_says_so(door, warm):
    saved = stateful(door, frozen=["first"]).compiled.mkor.state_dict()
    training = stateful(door, steps=warm)
    assert training.compiled.mkor.load_state_dict(saved) == []
    training.said.clear()
    for _ in range(3):
        training.step(*batch())
    (said,) = training.said
    assert "fresh factors: first.weight (the loaded state has none" in said
    state = training.compiled.mkor.state_dict()
    assert not torch.equal(state["first.weight.L"], torch.eye(8).double())


@ALL
@pytest.mark.parametrize("warm", [False, True])
def test_a_state_of_another_head(door, warm):
    saved = stateful(door, outputs=10).compiled.mkor.state_dict()
    training = stateful(door, steps=warm)
    before = training.compiled.mkor.state_dict()
    with pytest.raises(ValueError, match=r"head\.weight\.L: loaded \(10, 10\), here \(4, 4\).*strict=False"):
        training.compiled.mkor.load_state_dict(saved)
    assert all(torch.equal(t, before[key]) for key, t in training.compiled.mkor.state_dict().items())
    with pytest.warns(UserWarning, match=r"of the loaded state head\.weight\.L: loaded \(10, 10\).* was left out"):
        left = training.compiled.mkor.load_state_dict(saved, strict=False)
    assert {key for key in left if not key.endswith("scale")} == {"head.weight.L", "head.weight.R"}
    state = training.compiled.mkor.state_dict()
    assert torch.equal(state["first.weight.L"], saved["first.weight.L"]) and state["step"] == saved["step"]
    for _ in range(3):
        training.step(*batch())
    fresh = [text for text in training.said if "fresh factors: head.weight (the loaded state has none" in text]
    assert len(fresh) == 1


@BOTH
def test_a_state_with_more_than_the_model_has(door):
    saved = stateful(door).compiled.mkor.state_dict()
    training = Training(door, nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double())
    with pytest.raises(ValueError, match=r"first\.weight\.L, first\.weight\.R belong to no parameter of this one"):
        training.compiled.mkor.load_state_dict(saved)
    with pytest.warns(UserWarning, match="was left out"):
        left = training.compiled.mkor.load_state_dict(saved, strict=False)
    assert set(left) == saved.keys() - {"step"}
    training.step(*batch())


@ALL
def test_factors_of_weights_that_are_gone_go_too(door):
    """What is saved afterwards loads into a new handle of the model as it is."""
    training = Training(door, build())
    training.step(*batch())
    training.optimizer.zero_grad()
    training.model.second = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    training.hold(training.model.parameters())
    for _ in range(2):
        training.step(*batch())
    saved = training.compiled.mkor.state_dict()
    assert "second.weight.L" not in saved and "second.1.weight.L" in saved
    other = Training(door, training.model)
    assert other.compiled.mkor.load_state_dict(saved) == []
    training.compiled.mkor.metrics()


@pytest.mark.parametrize("door", ["compile", "backward"])
def test_statistics_follow_the_dtype_of_the_model(door):
    rule = mkor_fx.MKOR.published(factor_dtype=torch.float64)
    model = build().float()
    training = Training(door, model, rule=rule)
    x, y = batch()
    training.step(x.float(), y)
    training.optimizer.zero_grad()
    model.double()
    twin = copy.deepcopy(model)
    fresh = Training(door, twin, rule=rule)
    fresh.compiled.mkor.load_state_dict(training.compiled.mkor.state_dict())
    for one in (training, fresh):
        for number in range(2):
            one.step(x + number, y)
    close(model, twin, 1e-14 if door == "compile" else 1e-7)  # the last float32 statistics are refreshed from on either side


def test_parameters_that_are_lent_for_a_call_are_no_change():
    """The average of weights, evaluated by torch.func.functional_call; and an inner loop of a meta-learner."""
    training = Training("compile", build())
    handle, compilations = training.compiled, []
    average = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    for _ in range(3):
        training.step(*batch())
        x, y = batch()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            found = torch.func.functional_call(handle, average, (x,))
        torch.testing.assert_close(found, torch.func.functional_call(training.model, average, (x,)))
        leaves = {name: t.clone().requires_grad_() for name, t in average.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = functional.cross_entropy(torch.func.functional_call(handle, leaves, (x,)), y)
        assert all(g is not None for g in torch.autograd.grad(loss, list(leaves.values())))
        compilations.append(len(handle.graphs.captured))
    assert compilations == [1, 1, 1] and training.said == [] and handle.mkor.step == 3
