"""Factor state: named by parameter, exactly resumable, safe to load, independent of casts."""

import copy
import io

import pytest
import torch
import zoo

import mkor_fx
from mkor_fx import MKOR

RULE = MKOR.published(factor_dtype=torch.float64)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def new_step(model, loss_fn, refresh_every=3, rule=RULE):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return mkor_fx.compile_step(model, loss_fn, optimizer, rule, backend="eager", refresh_every=refresh_every)


def new_loop(model, loss_fn, refresh_every=3, **options):
    """A training loop over the drop-in model that looks like a compiled step."""
    compiled = mkor_fx.compile(model, RULE, backend="eager", refresh_every=refresh_every, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x, y):
        optimizer.zero_grad()
        loss_fn(compiled(x), y).backward()
        optimizer.step()

    step.mkor, step.optimizer = compiled.mkor, optimizer
    return step


def new_backward_loop(model, loss_fn):
    return new_loop(model, loss_fn, precondition="backward")


@pytest.mark.parametrize("build", [new_step, new_loop, new_backward_loop])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_exact_resume_at_any_step(build, stop):
    model, loss_fn, batches = zoo.build("mlp", dtype=torch.float64, steps=8)
    step = build(model, loss_fn)
    for x, y in batches[:stop]:
        step(x, y)
    saved = through_disk(
        {"model": model.state_dict(), "optimizer": step.optimizer.state_dict(), "mkor": step.mkor.state_dict()}
    )
    fresh = zoo.build("mlp", dtype=torch.float64, seed=7)[0]
    resumed = build(fresh, loss_fn)
    fresh.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.mkor.load_state_dict(saved["mkor"])
    for x, y in batches[stop:]:
        step(x, y), resumed(x, y)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
    one, other = step.mkor.state_dict(), resumed.mkor.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_state_is_a_plain_dict_of_tensors_named_by_parameter():
    model, loss_fn, batches = zoo.build("cnn")
    step = new_step(model, loss_fn, rule=MKOR.published())
    assert step.mkor.state_dict().keys() == {"step"}
    step(*batches[0])
    state = step.mkor.state_dict()
    assert type(state) is dict and all(type(value) is torch.Tensor for value in state.values())
    assert state["conv1.weight.L"].shape == (8, 8) and state["conv1.weight.R"].shape == (18, 18)
    assert state["step"].shape == () and state["step"] == 1


def test_state_dict_is_a_copy_and_an_initial_one_resets():
    model, loss_fn, batches = zoo.build("mlp")
    step = new_step(model, loss_fn, rule=MKOR.published())
    initial = step.mkor.state_dict()
    step(*batches[0])
    kept = step.mkor.state_dict()
    copies = {key: value.clone() for key, value in kept.items()}
    step(*batches[1])
    assert all(torch.equal(kept[key], copies[key]) for key in kept)
    step.mkor.load_state_dict(initial)
    state = step.mkor.state_dict()
    assert state.pop("step") == 0
    assert all(torch.equal(factor, torch.eye(len(factor))) for factor in state.values())


def test_doors_read_each_others_state():
    model, loss_fn, batches = zoo.build("gpt", dtype=torch.float64, steps=3)
    step = new_step(model, loss_fn)
    for x, y in batches:
        step(x, y)
    loop = new_loop(copy.deepcopy(model), loss_fn)
    loop.mkor.load_state_dict(step.mkor.state_dict())
    loop.optimizer.load_state_dict(step.optimizer.state_dict())
    step(*batches[0]), loop(*batches[0])
    one, other = step.mkor.state_dict(), loop.mkor.state_dict()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("when", ["before the first step", "after a step"])
def test_loading_another_models_state_names_it_and_changes_nothing(when):
    model, loss_fn, batches = zoo.build("mlp")
    step, (other, other_loss, other_batches) = new_step(model, loss_fn, rule=MKOR.published()), zoo.build("cnn")
    stranger = new_step(other, other_loss, rule=MKOR.published())
    stranger(*other_batches[0])
    if when == "after a step":
        step(*batches[0])
    before = step.mkor.state_dict()
    with pytest.raises(ValueError, match=r"another model's.*conv1\.weight\.L"):
        step.mkor.load_state_dict(stranger.mkor.state_dict())
    with pytest.raises(ValueError, match="no 'step'"):
        step.mkor.load_state_dict({})
    wrong = {**before, "hidden.weight.L": torch.eye(5), "step": torch.tensor(3)}
    with pytest.raises(ValueError, match=r"hidden\.weight\.L"):
        step.mkor.load_state_dict(wrong)
    after = step.mkor.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("door", [new_step, new_loop])
def test_factors_keep_their_dtype_beside_bfloat16_parameters(factor_dtype, door):
    model, loss_fn, batches = zoo.build("mlp")
    model = model.to(torch.bfloat16)
    if door is new_step:
        step = new_step(model, loss_fn, rule=MKOR.published(factor_dtype=factor_dtype))
    else:
        compiled = mkor_fx.compile(model, MKOR.published(factor_dtype=factor_dtype), backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x, y):
            loss_fn(compiled(x), y).backward()
            optimizer.step()

        step.mkor = compiled.mkor
    for x, y in batches[:3]:
        step(x.to(torch.bfloat16), y)
    state = step.mkor.state_dict()
    assert state.pop("step") == 3 and state
    for factor in state.values():
        assert factor.dtype == factor_dtype
        assert torch.linalg.eigvalsh(factor.double()).min() > 0
    step.mkor.load_state_dict({**state, "step": torch.tensor(3)})


def test_factors_follow_their_parameter_to_another_device():
    """On the meta device no values exist, but the move is the same code."""
    model, loss_fn, batches = zoo.build("mlp")
    step = new_step(model, loss_fn, rule=MKOR.published())
    step(*batches[0])
    model.to("meta")
    factors = step.mkor.of(model.hidden.weight)
    assert {factor.device.type for factor in factors.values()} == {"meta"}


def test_state_survives_replaced_parameters():
    """``load_state_dict(assign=True)`` puts other Parameter objects in place: factors belong to names."""
    model, loss_fn, batches = zoo.build("mlp")
    step = new_step(model, loss_fn, rule=MKOR.published())
    step(*batches[0])
    before = step.mkor.of(model.hidden.weight)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert step.mkor.of(model.hidden.weight) is before
