"""The optimizer's step as people really call it: closures, scalers, several optimizers, accumulation, skipped steps."""

import copy

import pytest
import torch
from test_lockstep import reference_for
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR

RULE = MKOR.published(factor_dtype=torch.float64)


def pair(rule=RULE, dtype=torch.float64, **options):
    """A model with its drop-in handle, and a twin for the reference."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)
    twin = copy.deepcopy(model)
    return model, mkor_fx.compile(model, rule, backend="eager", **options), twin


def batch(dtype=torch.float64, scale=1.0):
    return scale * torch.randn(12, 6, dtype=dtype), torch.randint(0, 4, (12,))


def close(model, twin, tolerance=1e-12):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def reference_step(twin, reference, *batches):
    for x, y in batches:
        (functional.cross_entropy(twin(x), y) / len(batches)).backward()
    reference.step()


def test_closure_is_preconditioned_behind_its_backward():
    model, compiled, twin = pair()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    reference = reference_for(twin, RULE, other)
    for _ in range(3):
        x, y = batch()

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = functional.cross_entropy(compiled(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        torch.testing.assert_close(loss, functional.cross_entropy(twin(x), y))
        reference_step(twin, reference, (x, y))
        close(model, twin)
    assert compiled.mkor.step == 3


def test_closure_by_keyword():
    model, compiled, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        return torch.zeros(())

    optimizer.step(closure=closure)
    assert compiled.mkor.step == 1


def test_lbfgs_calls_its_closure_many_times():
    model, compiled, _ = pair()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    x, y = batch()
    first = functional.cross_entropy(model(x), y).item()

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(compiled(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert functional.cross_entropy(model(x), y).item() < first
    assert compiled.mkor.step > 1


@pytest.mark.parametrize("form", ["forgetful", "scale_free"])
def test_gradient_scaler(form):
    """A scaled loss gives the trajectory of an unscaled one, whatever the rule makes of scale."""
    rule = MKOR.published(form=form, factor_dtype=torch.float64)
    model, compiled, twin = pair(rule)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2, fused=False) for m in (model, twin))
    reference, scaler = reference_for(twin, rule, other), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        x, y = batch()
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(compiled(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        reference_step(twin, reference, (x, y))
        close(model, twin, 1e-9)


def test_fused_optimizer_under_a_scaler():
    model, compiled, twin = pair(MKOR.published(form="forgetful"), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    reference = reference_for(twin, MKOR.published(form="forgetful"), other)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        x, y = batch(torch.float32)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(compiled(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        reference_step(twin, reference, (x, y))
        close(model, twin, 1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_that_finds_an_inf_touches_nothing(fused):
    model, compiled, _ = pair(MKOR.published(), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number in range(4):
        x, y = batch(torch.float32)
        if number == 2:
            x[0, 0] = float("inf")
        before = [p.detach().clone() for p in model.parameters()], compiled.mkor.state_dict()
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(compiled(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True)]
        changed = [not torch.equal(t, before[1][k]) for k, t in compiled.mkor.state_dict().items()
                   if k != "step" and k in before[1]]
        assert all(moved) == (number != 2) and any(moved) == (number != 2)
        assert any(changed) == (number not in (0, 2))
    assert all(torch.isfinite(t).all() for t in compiled.mkor.state_dict().values())


def test_two_optimizers_take_one_step():
    model, compiled, twin = pair(refresh_every=2)
    own = [torch.optim.SGD(layer.parameters(), lr=lr) for layer, lr in ((model[0], 0.1), (model[2], 0.05))]
    other = torch.optim.SGD(
        [{"params": twin[0].parameters(), "lr": 0.1}, {"params": twin[2].parameters(), "lr": 0.05}], lr=0.1
    )
    reference = reference_for(twin, RULE, other, refresh_every=2)
    for number in range(5):
        x, y = batch()
        for optimizer in own:
            optimizer.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        for optimizer in own:
            optimizer.step()
        reference_step(twin, reference, (x, y))
        close(model, twin)
        assert compiled.mkor.step == number + 1


def test_optimizers_that_alternate_both_refresh():
    """As in adversarial training: one half of the model steps on its own, and both halves see refreshes."""
    model, compiled, _ = pair(refresh_every=3)
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2]))
    for number in range(8):
        x, y = batch()
        model.zero_grad()
        functional.cross_entropy(compiled(x), y).backward()
        (second if number % 4 == 3 else first).step()
    state = compiled.mkor.state_dict()
    assert not torch.equal(state["2.weight.R"], torch.eye(9).double())
    assert not torch.equal(state["0.weight.R"], torch.eye(6).double())


def test_accumulation_and_clipping_come_out_as_in_the_reference():
    model, compiled, twin = pair()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    reference = reference_for(twin, RULE, other)
    for _ in range(3):
        batches = [batch(), batch()]
        optimizer.zero_grad()
        for x, y in batches:
            (functional.cross_entropy(compiled(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        for x, y in batches:
            (functional.cross_entropy(twin(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        reference.step()
        close(model, twin)


@pytest.mark.parametrize("zero_grad_last", [False, True])
def test_a_skipped_step_leaves_nothing_behind(zero_grad_last):
    """A backward whose step the user skips; ``zero_grad`` before the forward, or between it and the backward."""
    model, compiled, twin = pair()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    reference = reference_for(twin, RULE, other)
    for number in range(4):
        x, y = batch(scale=100.0 if number == 1 else 1.0)
        if not zero_grad_last:
            optimizer.zero_grad()
        loss = functional.cross_entropy(compiled(x), y)
        if zero_grad_last:
            optimizer.zero_grad()
        loss.backward()
        if number != 1:
            optimizer.step()
            reference_step(twin, reference, (x, y))
        close(model, twin)
    assert compiled.mkor.step == 3


def test_a_step_on_zero_gradients_is_harmless():
    """What distributed checkpointing does to make optimizer state exist."""
    model, compiled, _ = pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    functional.cross_entropy(compiled(batch()[0]), batch()[1]).backward()
    optimizer.step()
    before = compiled.mkor.state_dict()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = compiled.mkor.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_other_models_and_a_failing_step_are_left_alone():
    model, compiled, _ = pair()
    stranger = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(stranger.parameters(), lr=1.0)
    stranger(torch.ones(1, 2)).sum().backward()
    expected = stranger.weight.detach() - stranger.weight.grad
    optimizer.step()
    torch.testing.assert_close(stranger.weight.detach(), expected)

    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            raise RuntimeError("broken")

    failing = Failing(model.parameters(), lr=0.1)
    x, y = batch()
    functional.cross_entropy(compiled(x), y).backward()
    raw = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        failing.step()
    good = torch.optim.SGD(model.parameters(), lr=0.1)
    good.step()
    for p, g in zip(model.parameters(), raw, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_model_compiled_twice_is_preconditioned_once():
    """As happens when a notebook's cell runs again: the older handle has no fresh statistics and stays out."""
    model, first, twin = pair()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    reference = reference_for(twin, RULE, other)
    second = mkor_fx.compile(model, RULE, backend="eager")
    for number, handle in enumerate((first, second, second)):
        x, y = batch()
        optimizer.zero_grad()
        functional.cross_entropy(handle(x), y).backward()
        if number == 1:  # the reference goes on from what the first handle has learnt
            second.mkor.load_state_dict(first.mkor.state_dict())
        optimizer.step()
        reference_step(twin, reference, (x, y))
        close(model, twin)
    assert (first.mkor.step, second.mkor.step) == (1, 3)


def test_a_failing_update_changes_nothing():
    class Blind(MKOR):
        def unscale(self, summary, scale):
            raise NotImplementedError("no scale here")

    model, compiled, _ = pair(Blind(), torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = batch(torch.float32)
    scaler.scale(functional.cross_entropy(compiled(x), y)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match="no scale here"):
        scaler.step(optimizer)
    assert compiled.mkor.step == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("layer", ["joint", "channels_last"])
def test_a_fused_optimizer_gets_directions_in_the_memory_layout_of_the_weight(layer):
    """Fused kernels read both in one run. Here a direction that is a slice, and a weight whose channels come last."""
    torch.manual_seed(0)
    if layer == "joint":
        model, x, rule = nn.Linear(6, 4), torch.randn(8, 6), MKOR.published(bias="joint")
    else:
        model, x, rule = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), torch.randn(8, 3, 5, 5), MKOR.published()
    results = []
    for fused in (False, True):
        twin = copy.deepcopy(model)
        compiled = mkor_fx.compile(twin, rule, backend="eager")
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()
        results.append(list(twin.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
