"""Bad input: an error that names the thing and the remedy, before anything is changed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

import mkor_fx
from mkor_fx import MKOR

X, Y = torch.randn(5, 4), torch.randn(5, 2)


def network(inputs=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 3), nn.Tanh(), nn.Linear(3, 2))


def adam(model):
    return torch.optim.Adam(model.parameters())


def compile_step(model, loss_fn=F.mse_loss, optimizer=None, rule=MKOR.published(), **options):  # noqa: B008
    return mkor_fx.compile_step(model, loss_fn, optimizer or adam(model), rule, **{"backend": "eager"} | options)


def compile(model, rule=MKOR.published(), **options):  # noqa: B008
    return mkor_fx.compile(model, rule, **{"backend": "eager"} | options)


DOORS = pytest.mark.parametrize("door", [compile, compile_step])


def snapshot(model, optimizer=None, mkor=None):
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    state |= {f"{name}.grad": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state["modules"] = {name: sorted(vars(module)) for name, module in model.named_modules()}
    if optimizer is not None:
        state["optimizer"] = copy.deepcopy(optimizer.state_dict())
    if mkor is not None:
        state["mkor"] = mkor.state_dict()
    return state


def assert_unchanged(before, after):
    old, new = (pytree.tree_flatten_with_path(state)[0] for state in (before, after))
    assert [path for path, _ in old] == [path for path, _ in new]
    for (path, a), (_, b) in zip(old, new):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f"{pytree.keystr(path)} changed"


OPTIONS = {
    "refresh_every": ({"refresh_every": 0}, r"refresh_every=0: .* at least 1"),
    "refresh_every type": ({"refresh_every": 2.5}, r"refresh_every=2\.5: must be an integer"),
    "refresh_every bool": ({"refresh_every": True}, r"refresh_every=True: must be an integer"),
    "backend": ({"backend": "aot_eager"}, r"backend='aot_eager': must be one of inductor, eager"),
    "mode": ({"mode": "fast"}, r"mode='fast': must be one of .*reduce-overhead"),
    "options": ({"options": {"max_autotoon": True}}, r"'max_autotoon' is no option"),
    "mode and options": ({"mode": "default", "options": {"max_autotune": True}}, r"either mode or options"),
    "skip": ({"skip": ["head.*"]}, r"'head\.\*' matches no parameter.*0\.weight"),
    "rule": ({"rule": "mkor"}, r"rule='mkor': must be an update rule"),
    "rule class": ({"rule": MKOR}, r"must be an update rule such as mkor_fx\.MKOR\(\)"),
}


@DOORS
@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option(door, case):
    options, message = OPTIONS[case]
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        door(model, **options)
    assert_unchanged(before, snapshot(model))


def test_options_of_one_door():
    with pytest.raises(ValueError, match=r"precondition='forward': must be 'step' or 'backward'"):
        compile(network(), precondition="forward")
    with pytest.raises(ValueError, match=r"fullgraph=True; mkor_fx\.compile handles graph breaks"):
        compile_step(network(), fullgraph=False)
    with pytest.raises(ValueError, match=r"use precondition='step'"):
        compile(network(), MKOR.published(statistic="mean+gradient"), precondition="backward")


@DOORS
def test_nothing_to_train(door):
    frozen = network().requires_grad_(False)
    options = {"optimizer": adam(network())} if door is compile_step else {}
    with pytest.raises(ValueError, match=r"Sequential has no trainable parameter.*requires_grad"):
        door(frozen, **options)
    with pytest.raises(ValueError, match="no trainable parameter"):
        mkor_fx.explain(frozen, X)
    with pytest.raises(ValueError, match=r"nn\.Module, got a function"):
        door(lambda x: x, **options)


def test_bad_optimizers():
    model, other = network(), network()
    mixed = torch.optim.SGD([*model.parameters(), *other[0].parameters()], lr=0.1)
    hooked = adam(model)
    hooked.register_step_post_hook(lambda *_: None)
    cases = [
        (adam(other), r"4 of the optimizer's 4 parameters are not this model's.*model\.parameters\(\)"),
        (mixed, r"2 of the optimizer's 6 parameters are not this model's \(shapes \[\(3, 4\), \(3,\)\]\)"),
        (hooked, r"hooks.*mkor_fx\.compile\(model\)"),
        (torch.optim.LBFGS(model.parameters()), r"LBFGS cannot be compiled.*mkor_fx\.compile"),
        (torch.optim.SGD, r"must be a torch\.optim\.Optimizer, as AdamW"),
    ]
    for optimizer, message in cases:
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            compile_step(model, optimizer=optimizer)
        assert_unchanged(before, snapshot(model))


LOSSES = {
    "not a scalar": (lambda out, y: (out - y) ** 2, r"shape \(5, 2\), it must be a scalar.*mean\(\)"),
    "integer": (lambda out, y: out.argmax(), r"torch\.int64.*floating-point loss"),
    "detached": (lambda out, y: F.mse_loss(out.detach(), y), r"depends on no trainable parameter.*detached"),
    "without the outputs": (lambda out, y: y.sum(), r"depends on no trainable parameter"),
    "read to the host": (lambda out, y: F.mse_loss(out, y).item(), r"loss"),
    "a Python number": (lambda out, y: 1.0, r"the loss is not a tensor"),
    "nothing": (lambda out, y: None, r"the loss is not a tensor"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_bad_loss_changes_nothing_and_a_good_one_works_afterwards(case):
    bad, message = LOSSES[case]
    model = network()
    optimizer = adam(model)
    step = compile_step(model, bad, optimizer)
    before = snapshot(model, optimizer, step.mkor)
    with pytest.raises(ValueError, match=message):
        step(X, Y)
    assert_unchanged(before, snapshot(model, optimizer, step.mkor))
    assert step.compilations == 0
    compile_step(model, F.mse_loss, optimizer)(X, Y)
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients(context):
    model = network()
    optimizer = adam(model)
    step = compile_step(model, optimizer=optimizer)
    step(X, Y)
    before = snapshot(model, optimizer, step.mkor)
    with context(), pytest.raises(RuntimeError, match=r"gradients enabled.*to evaluate, call the model itself"):
        step(X, Y)
    assert_unchanged(before, snapshot(model, optimizer, step.mkor))
    step(X, Y)


@DOORS
def test_integers_where_floats_are_needed(door):
    """Eager torch says: mat1 and mat2 must have the same dtype, but got Long and Float."""
    model = network()
    before, handle = snapshot(model), door(model)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        handle(torch.ones(5, 4, dtype=torch.int64), *([Y] if door is compile_step else []))
    message = str(caught.value)
    assert "finfo" not in message and any(word in message for word in ("Long", "int64")), message[:300]
    assert_unchanged(before, snapshot(model))


def trained(door, model=None, batch=(X, Y), steps=1):
    model = model or network()
    optimizer, handle = adam(model), None
    handle = door(model, optimizer=optimizer) if door is compile_step else door(model)
    for _ in range(steps):
        run(handle, optimizer, batch)
    return model, optimizer, handle


def run(handle, optimizer, batch=(X, Y)):
    if isinstance(handle, nn.Module):
        optimizer.zero_grad()
        F.mse_loss(handle(batch[0]), batch[1]).backward()
        optimizer.step()
    else:
        handle(*batch)


GOOD = {"0.weight.L": 3, "0.weight.R": 4, "2.weight.L": 2, "2.weight.R": 3}
STATES = {  # sizes of a state's factors (None: no "step" beside good ones), words of the error
    "other names": ({"body.weight.L": 3, "body.weight.R": 4}, r"body\.weight\.L, body\.weight\.R"),
    "other shapes": (GOOD | {"0.weight.R": 6}, r"0\.weight\.R.*\(6, 6\)"),
    "sides exchanged": (GOOD | {"0.weight.L": 4, "0.weight.R": 3}, r"0\.weight\.L.*\(4, 4\)"),
    "a side too few": ({key: size for key, size in GOOD.items() if key != "0.weight.R"}, r"0\.weight\.R"),
    "a side too many": (GOOD | {"0.weight.Q": 3}, r"0\.weight\.Q"),
    "no step": (None, r"no 'step'"),
}


@DOORS
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("case", STATES)
def test_state_of_another_model(door, steps, case):
    """Before the first step the factors are not known: what cannot be told then must be said before they are used."""
    sizes, message = STATES[case]
    state = {key: 2 * torch.eye(size) for key, size in (sizes or GOOD).items()}
    state |= {"step": torch.tensor(7)} if sizes else {}
    model, optimizer, handle = trained(door, steps=steps)
    before = snapshot(model, optimizer, handle.mkor)
    before = {key: value for key, value in before.items() if not key.endswith(".grad") and (steps or key != "mkor")}
    with pytest.raises(ValueError, match=message):
        handle.mkor.load_state_dict(state)
        run(handle, optimizer)
    after = snapshot(model, optimizer, handle.mkor)
    assert_unchanged(before, {key: after[key] for key in before})


@DOORS
def test_weights_of_a_dtype_that_no_rule_knows_are_declined(door):
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64))
    x = torch.randn(4, 3, dtype=torch.complex64)
    assert "complex" in str(mkor_fx.explain(model, x)["0.weight"].declined)
    if door is compile_step:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compile_step(model, lambda out, y: (out - y).abs().mean(), optimizer)(x, x[:, :2])
    else:
        compile(model)(x).abs().mean().backward()


def test_nothing_to_look_at_yet():
    with pytest.raises(ValueError, match=r"explain\(model, \*batch\)"):
        mkor_fx.explain(network())
    with pytest.raises(RuntimeError, match="nothing is compiled yet"):
        str(compile_step(network()).graphs)
    with pytest.raises(RuntimeError, match="nothing is compiled yet"):
        compile(network()).graphs["match"]


def test_a_handle_can_be_explained_by_a_batch_before_it_has_run():
    handle = compile(network())
    with pytest.raises(ValueError, match=r"nothing to explain yet: pass an example batch"):
        mkor_fx.explain(handle)
    assert len(mkor_fx.explain(handle, X, rule=mkor_fx.MKOR.published()).covered) == 4
    assert not handle.graphs.captured and not handle.mkor.tensors() and handle.mkor.step == 0


def test_a_name_that_was_written_nowhere():
    step = compile_step(network())
    step(X, Y)
    assert "# 0.weight: refresh and precondition" in step.graphs["rewrite"].inserted("0.weight")
    with pytest.raises(KeyError, match=r"nothing was written for 'wieght'; there is .*0\.weight, 2\.weight"):
        step.graphs["rewrite"].inserted("wieght")
    assert step.graphs["capture"].inserted("wieght") == ""  # where nothing was written at all


# ---- options that would do nothing ---------------------------------------------------------------------------------------


IDLE = {
    "mode beside eager": ({"mode": "reduce-overhead"}, r"backend='eager' compiles nothing, so mode and options would do"),
    "options beside eager": ({"options": {"max_autotune": True}}, r"backend='eager' compiles nothing"),
}
IDLE_IN_COMPILE = {
    "gradient_bytes": r"Communication\(gradient_bytes\) would do nothing here, where gradients are the wrapper's or yours",
    "padding": r"Communication\(padding\) would do nothing here",
    "statistics_dtype": r"Communication\(statistics_dtype\) would do nothing here.*statistics travel as they are",
}
VALUES = {"gradient_bytes": 1 << 20, "padding": 0.5, "statistics_dtype": torch.bfloat16}


@DOORS
@pytest.mark.parametrize("case", IDLE)
def test_options_that_would_do_nothing_are_refused(door, case):
    options, message = IDLE[case]
    with pytest.raises(ValueError, match=message):
        door(network(), **options)


@pytest.mark.parametrize("name", IDLE_IN_COMPILE)
def test_so_are_those_of_the_other_door(name):
    communication = mkor_fx.Communication(**{name: VALUES[name]})
    with pytest.raises(ValueError, match=IDLE_IN_COMPILE[name]):
        compile(network(), communication=communication)
    compile_step(network(), communication=communication)  # where it does something, if there are ranks
    with pytest.raises(ValueError, match=r"average='rows'\) needs compile_step"):
        compile(network(), communication=mkor_fx.Communication(average="rows"))


# ---- nothing is made before all that can fail has passed -----------------------------------------------------------------


class Sum(torch.optim.Optimizer):
    """Makes its state in its step: cannot be compiled before."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["total"] = p.grad.sum().item()


def broken_rule(function):
    """A rule that fails where it is written into the graph, or is compiled."""

    class Broken(MKOR):
        pass

    def fail(*_, **__):
        raise RuntimeError(f"{function} is broken")

    setattr(Broken, function, fail)
    return Broken()


FAILS = {
    "the optimizer": lambda model: {"optimizer": Sum(model.parameters())},
    "update": lambda model: {"rule": broken_rule("update")},
    "summarize": lambda model: {"rule": broken_rule("summarize")},
    "sides": lambda model: {"rule": broken_rule("sides")},
    "the loss": lambda model: {"loss_fn": lambda out, y: (out - y).square()},
}


@pytest.mark.parametrize("case", FAILS)
def test_a_step_that_cannot_be_written_changes_nothing(case):
    model = network()
    options = {"optimizer": adam(model)} | FAILS[case](model)
    step, optimizer = compile_step(model, **options), options["optimizer"]
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(Exception, match=r"broken|cannot be compiled|scalar"):
            step(X, Y)
        assert_unchanged(before, snapshot(model, optimizer))
        assert not step.mkor.tensors() and step.mkor.step == 0 and not optimizer.state and step.skipped == 0


def test_nor_does_one_that_cannot_be_compiled(monkeypatch):
    model = network()
    optimizer = adam(model)
    step = compile_step(model, optimizer=optimizer)
    before = snapshot(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr("mkor_fx.doors.whole_step.compile_graph", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            step(X, Y)
    assert_unchanged(before, snapshot(model, optimizer))
    assert not step.mkor.tensors() and not optimizer.state
    step(X, Y)
    assert step.mkor.step == 1 and optimizer.state


def test_a_loaded_state_that_does_not_fit_is_found_before_anything_is_made():
    """Before the first step only the shapes that a weight could have are known; what it has comes out when it is written."""
    model = nn.Sequential(nn.Embedding(4, 4), nn.Flatten(0, 1))
    optimizer = adam(model)
    step = compile_step(model, lambda out, y: out.square().mean(), optimizer)
    step.mkor.load_state_dict({"0.weight.L": torch.eye(4), "0.weight.R": torch.eye(4), "step": torch.tensor(3)})
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"the state is another model's: unexpected 0\.weight\.R"):
        step(torch.zeros(5, 1, dtype=torch.long), Y)
    assert_unchanged(before, snapshot(model, optimizer))
    assert not step.mkor.tensors() and not optimizer.state


# ---- calls of a compiled step --------------------------------------------------------------------------------------------


CALLS = {
    "no target": (lambda step: step(X), r"called with 1 positional arguments: the last positional argument is the target"),
    "keywords alone": (lambda step: step(input=X, target=Y), r"the target as its last positional argument: step\(x, y\)"),
    "too many": (lambda step: step(X, X, Y), r"called with 3 positional arguments: .*Sequential\.forward cannot take"),
    "nothing": (lambda step: step(), r"with the target as its last positional argument"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_the_model_cannot_take(case):
    call, message = CALLS[case]
    model = network()
    step = compile_step(model)
    before = snapshot(model, step.optimizer)
    with pytest.raises(TypeError, match=message):
        call(step)
    assert_unchanged(before, snapshot(model, step.optimizer))
    step(X, Y)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_step_is_not_copied(copied):
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: make another one with compile_step, and take over"):
        copied(compile_step(network()))


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_its_model_and_optimizer_stay(name):
    step = compile_step(network())
    with pytest.raises(AttributeError, match=f"property '{name}'"):
        setattr(step, name, None)
