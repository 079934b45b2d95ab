"""``precondition="backward"``: the gradient arrives preconditioned, with the factors and norms from before the step."""

import copy

import pytest
import torch
import zoo
from test_lockstep import reference_for

import mkor_fx
from mkor_fx import MKOR

RULE = MKOR.published(factor_dtype=torch.float64)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "breaks"])
def test_direction_is_that_of_the_factors_before_the_step(name):
    """Beside the reference run on the same raw gradients, whose factors are one refresh ahead."""
    model, loss_fn, batches = zoo.build(name, dtype=torch.float64, steps=5)
    twin = copy.deepcopy(model)
    compiled = mkor_fx.compile(model, RULE, backend="eager", precondition="backward")
    reference = reference_for(twin, RULE, torch.optim.SGD(twin.parameters(), lr=0.0))
    norms: dict = {}
    for x, y in batches:
        model.zero_grad()
        loss_fn(compiled(x), y).backward()
        loss_fn(twin(x), y).backward()
        own, raw = dict(model.named_parameters()), {n: p.grad.clone() for n, p in twin.named_parameters()}
        for key, _, bias, (left_key, right_key) in reference.sites.values():
            left = reference.state.get(left_key, torch.eye(len(raw[key])).to(raw[key]))  # a vocabulary has no factor
            direction = left @ raw[key].flatten(1) @ reference.state[right_key]
            expected = direction * norms.get(key, 1.0)
            torch.testing.assert_close(own[key].grad.flatten(1), expected, rtol=1e-9, atol=1e-12)
            norms[key] = raw[key].norm() / direction.norm()
            if bias is not None:
                name_of_bias = next(n for n, p in twin.named_parameters() if p is bias)
                torch.testing.assert_close(
                    own[name_of_bias].grad, left @ raw[name_of_bias] * norms.get(name_of_bias, 1.0), rtol=1e-9, atol=1e-12
                )
                norms[name_of_bias] = raw[name_of_bias].norm() / (left @ raw[name_of_bias]).norm()
        reference.step()
    state = compiled.mkor.state_dict()
    for key, factor in reference.state.items():
        torch.testing.assert_close(state[key], factor, rtol=1e-9, atol=1e-12)
    assert compiled.mkor.step == len(batches)


def test_accumulation_is_exact_without_the_rescale():
    rule = MKOR.published(rescale=False, factor_dtype=torch.float64)
    model, loss_fn, batches = zoo.build("mlp", dtype=torch.float64, steps=4)
    twin = copy.deepcopy(model)
    for trained, parts in ((model, 1), (twin, 2)):
        compiled = mkor_fx.compile(trained, rule, backend="eager", precondition="backward")
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for x, y in batches:
            x, y = x[: len(x) // 2 * 2], y[: len(y) // 2 * 2]
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_fn(compiled(xs), ys) / parts).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_nan_enters_no_factor():
    model, loss_fn, batches = zoo.build("mlp")
    compiled = mkor_fx.compile(model, backend="eager", precondition="backward", rule=mkor_fx.MKOR.published())
    before: dict = {}
    for number, (x, y) in enumerate(batches[:4]):
        model.zero_grad()
        loss_fn(compiled(x * float("nan") if number == 2 else x), y).backward()
        state = compiled.mkor.state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
        if number == 2:
            assert all(torch.equal(state[key], before[key]) for key in before if key != "step")
        before = state
    assert any(not torch.equal(state[key], torch.eye(len(state[key]))) for key in state if key.endswith(".L"))


def test_rules_that_read_the_gradient_are_refused():
    model = zoo.build("mlp")[0]
    with pytest.raises(ValueError, match="precondition='step'"):
        mkor_fx.compile(model, MKOR.published(statistic="gradient"), precondition="backward")


# ---- looking, and going back ----------------------------------------------------------------------------------------------


def loop(rule=MKOR.published(factor_dtype=torch.float64), **options):  # noqa: B008
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)).double()
    compiled = mkor_fx.compile(model, rule, precondition="backward", backend="eager", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)

    def step(look=lambda: None, micro_batches=2):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
            torch.nn.functional.cross_entropy(compiled(x), torch.arange(12) % 4).backward()
            look()
        optimizer.step()

    return compiled, step


RULES = {"mkor": MKOR.published(factor_dtype=torch.float64), "kfac": mkor_fx.KFAC(derive_every=2)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_looking_at_the_state_changes_nothing_wherever_it_happens(rule):
    found = []
    for look in (False, True):
        compiled, step = loop(rule, refresh_every=2)
        for _ in range(5):
            step(compiled.mkor.state_dict if look else lambda: None)
        found.append((compiled.state_dict(), compiled.mkor.state_dict(), compiled.mkor.step))
    assert found[0][2] == found[1][2] == 5
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert all(torch.equal(t, other[key]) for key, t in one.items())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_looking_without_gradients(mode):
    compiled, step = loop()
    step()
    with mode():
        before = compiled.mkor.state_dict()
    step()
    assert int(before["step"]) == 1 and compiled.mkor.step == 2


def test_what_is_loaded_is_not_mixed_with_what_waits():
    compiled, step = loop()
    step(), step()
    saved = compiled.mkor.state_dict()
    step()
    compiled.mkor.load_state_dict(saved)
    now = compiled.mkor.state_dict()
    assert all(torch.equal(t, now[key]) for key, t in saved.items())
    step()
    compiled.mkor.reset()
    assert compiled.mkor.step == 0 and torch.equal(compiled.mkor.state_dict()["0.weight.L"], torch.eye(9).double())


def test_state_keeps_the_memory_order_that_compiled_graphs_expect():
    """An inverse comes transposed out of LAPACK."""
    torch.manual_seed(0)
    trained = []
    for backend in ("eager", "inductor"):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        compiled = mkor_fx.compile(model, mkor_fx.KFAC(derive_every=1), precondition="backward", backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(compiled(torch.randn(8, 6)), torch.randn(8, 4)).backward()
            optimizer.step()
        trained.append(model.weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)
