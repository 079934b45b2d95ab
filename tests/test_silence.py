"""Silence is a bug: a live model's weights that reach a step without statistics are named, once, with the reason and the
remedy; a compiled step that did not run its program raises."""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx


def compiled(model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, mkor_fx.compile(model, backend="eager", **{"rule": mkor_fx.MKOR.published(), **options})


def listen(train, steps=9):
    """What ``train()`` says in some steps."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            train()
    return [str(warning.message) for warning in said if "mkor_fx" in str(warning.message)]


def loop(backward, model, step=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train():
        optimizer.zero_grad()
        backward()
        (step or optimizer.step)()

    return train


X = torch.randn(16, 8)


class Counting(nn.Module):
    """Asks for a compilation at each call."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.Linear(8, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) / (1 + 1 / self.calls)


def inputs_only(model, handle):
    handle(X).square().mean().backward(inputs=list(model.parameters()))


def by_autograd(model, handle):
    params = list(model.parameters())
    for p, g in zip(params, torch.autograd.grad(handle(X).square().mean(), params), strict=True):
        p.grad = g


def forced_eager(model, handle):
    with torch.compiler.set_stance("force_eager"):
        handle(X).square().mean().backward()


def by_hand(model, handle):
    handle(X)
    for p in model.parameters():
        p.grad = torch.ones_like(p)


REASONS = {
    "backward(inputs=)": (inputs_only, r"was not asked for them, as by backward\(inputs=\.\.\.\).*call loss\.backward\(\)"),
    "autograd.grad": (by_autograd, r"was not asked for them, as by backward\(inputs=\.\.\.\) or torch\.autograd\.grad"),
    "forced eager": (forced_eager, r"torch\.compile ran the forward eagerly, at its recompile limit.*TORCH_LOGS=recompiles"),
    "the model itself": (lambda model, handle: model(X).square().mean().backward(), r"the compiled model was not called"),
    "by hand": (by_hand, r"no backward went through what the compiled model has returned"),
}


@pytest.mark.parametrize("case", REASONS)
def test_each_reason_once_by_name_with_the_remedy(case):
    backward, why = REASONS[case]
    model, handle = compiled()
    said = listen(loop(lambda: backward(model, handle), model))
    if case == "backward(inputs=)" and handle.mkor.step == 9:
        assert said == []
        return
    assert len(said) == 1, said
    assert said[0].startswith("mkor_fx does not precondition 0.weight, 2.weight in this step: the gradient came without")
    with pytest.warns(UserWarning, match=why):
        warnings.warn(said[0], stacklevel=1)
    assert handle.mkor.step == 0


def test_the_recompile_limit():
    model, handle = compiled(Counting())
    said = listen(loop(lambda: handle(X).square().mean().backward(), model), steps=14)
    assert len(said) == 1 and "inner.weight" in said[0] and "recompile limit" in said[0]
    assert 0 < handle.mkor.step < 14


def test_a_step_inside_of_the_backward():
    model, handle = compiled()
    own = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: (own[p].step(), own[p].zero_grad(), None)[-1])
    said = listen(lambda: handle(X).square().mean().backward())
    assert 1 <= len(said) <= 2 and all("precondition='backward'" in text for text in said)
    assert {name for text in said for name in ("0.weight", "2.weight") if name in text} == {"0.weight", "2.weight"}


def test_a_part_that_comes_without_statistics_is_named_alone():
    model, handle = compiled()
    whole = loop(lambda: handle(X).square().mean().backward(), model)
    assert listen(whole) == []
    head = loop(lambda: model[2](torch.randn(16, 16)).square().mean().backward(), model)
    (said,) = listen(head)
    assert "2.weight" in said and "0.weight" not in said
    assert listen(head) == [] and listen(whole) == []


class Partly(nn.Module):
    """One layer runs where torch.compile is told to stay out."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    @torch.compiler.disable
    def apart(self, x):
        return self.inner(x)

    def forward(self, x):
        return self.head(torch.tanh(self.apart(x)))


def test_a_layer_that_runs_outside_of_every_graph():
    model, handle = compiled(Partly())
    (said,) = listen(loop(lambda: handle(X).square().mean().backward(), model))
    assert "inner.weight in this step" in said and "ran outside of every graph" in said and handle.mkor.step == 9


def test_a_backward_that_has_raised_says_nothing_of_later_steps():
    model, handle = compiled()
    hook = model[2].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        handle(X).square().mean().backward()
    hook.remove()
    handle(X)
    (said,) = listen(loop(lambda: by_hand(model, handle), model))
    assert "no backward went through" in said


def test_an_older_handle_leaves_the_word_to_the_one_that_is_called():
    model, first = compiled()
    assert listen(loop(lambda: first(X).square().mean().backward(), model), 2) == []
    _, second = model, mkor_fx.compile(model, skip=["2.*"], backend="eager")
    assert listen(loop(lambda: second(X).square().mean().backward(), model)) == []


def fine():
    """Loops that must not be warned of: (name, what trains)."""
    model, handle = compiled()
    yield "as meant", loop(lambda: handle(X).square().mean().backward(), model)

    model, handle = compiled(skip=["2.*"])
    partly = loop(lambda: model[2](torch.randn(16, 16)).square().mean().backward(), model)
    yield "what is skipped", lambda: (handle(X).square().mean().backward(), partly())

    model, handle = compiled(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)))
    yield "vectors", loop(lambda: handle(X).square().mean().backward(), model)

    model, handle = compiled()

    def zeros():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    yield "zero gradients, as checkpoint libraries step on", loop(zeros, model)

    other = nn.Linear(8, 4)
    model, handle = compiled()
    yield "another model", loop(lambda: other(X).square().mean().backward(), other)

    model, handle = compiled(precondition="backward")
    yield "the backward mode", loop(lambda: handle(X).square().mean().backward(), model)

    model, handle = compiled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = handle(X).square().mean()
        loss.backward()
        return loss

    yield "a closure", lambda: optimizer.step(closure)

    model, handle = compiled()
    parts = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (model[0], model[2])]

    def both():
        model.zero_grad()
        handle(X).square().mean().backward()
        for part in parts:
            part.step()

    yield "two optimizers", both

    model, handle = compiled()
    scaler, scaled = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.01)

    def amp():
        scaled.zero_grad()
        scaler.scale(handle(X).square().mean()).backward()
        scaler.step(scaled)
        scaler.update()

    yield "a scaler", amp


def test_nothing_is_said_of_loops_that_are_fine():
    for name, train in fine():
        assert listen(train) == [], name


def test_nothing_is_said_of_a_model_that_was_dropped():
    model, handle = compiled()
    train = loop(lambda: model(X).square().mean().backward(), model)
    del handle
    gc.collect()
    assert listen(train) == []


def test_the_backward_mode_is_not_silent_either():
    model, _live = compiled(precondition="backward")
    (said,) = listen(loop(lambda: model(X).square().mean().backward(), model))
    assert "0.weight, 2.weight" in said and "was not called" in said


# ---- compiled steps -------------------------------------------------------------------------------------------------------


def compiled_step(model=None, **options):
    model = model or nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, mkor_fx.compile_step(model, functional.mse_loss, optimizer, backend="eager", **options)


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_may_not_be_compiled_raises_and_changes_nothing(stance, first):
    model, step = compiled_step(dynamic=False)
    if not first:
        step(torch.randn(16, 8), torch.randn(16, 4))
    before, count = model.weight.detach().clone(), step.mkor.step
    with torch.compiler.set_stance(stance), pytest.raises(RuntimeError, match=r"without being compiled|did not run|stance"):
        step(torch.randn(20, 8), torch.randn(20, 4))
    assert torch.equal(model.weight, before) and step.mkor.step == count
    step(torch.randn(20, 8), torch.randn(20, 4))
    assert step.mkor.step == count + 1 and not torch.equal(model.weight, before)


def test_a_step_at_its_recompile_limit_raises():
    model, step = compiled_step(Counting())
    with pytest.raises(RuntimeError, match="recompile limit"):
        for _ in range(14):
            step(X, torch.randn(16, 4))
    before = model.inner.weight.detach().clone()
    with pytest.raises(RuntimeError, match="recompile limit"):
        step(X, torch.randn(16, 4))
    assert torch.equal(model.inner.weight, before)
