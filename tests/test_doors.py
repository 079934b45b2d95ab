"""Two doors, one algorithm; and each door in the ways that people use models."""

import copy

import pytest
import torch
import zoo
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InductorError
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR

FLOAT64 = MKOR.published(factor_dtype=torch.float64)


def train_drop_in(model, loss_fn, batches, rule=FLOAT64, backend="eager", micro_batches=1, **options):
    """Losses of a plain loop over the drop-in model, AdamW, and its factors."""
    compiled = mkor_fx.compile(model, rule, backend=backend, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        total = 0.0
        for xs, ys in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = loss_fn(compiled(xs), ys) / micro_batches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    return losses, compiled.mkor.state_dict()


def assert_same(first, second, tolerance):
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert (one - other).norm() <= tolerance * other.norm().clamp_min(1e-30)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "checkpointed", "in_out"])
def test_both_doors_have_one_trajectory(name):
    model, loss_fn, batches = zoo.build(name, dtype=torch.float64)
    twin = copy.deepcopy(model)
    step = mkor_fx.compile_step(model, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-3), FLOAT64, backend="eager")
    losses = [step(x, y) for x, y in batches]
    others, state = train_drop_in(twin, loss_fn, batches)
    assert_same(model, twin, 1e-10)
    torch.testing.assert_close(torch.stack(losses), torch.stack(others), rtol=1e-10, atol=0)
    for key, factor in step.mkor.state_dict().items():
        torch.testing.assert_close(factor, state[key], rtol=1e-9, atol=1e-12)


@pytest.mark.nightly
def test_both_doors_have_one_trajectory_under_inductor():
    model, loss_fn, batches = zoo.build("mlp")
    twin = copy.deepcopy(model)
    step = mkor_fx.compile_step(model, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for x, y in batches:
        step(x, y)
    train_drop_in(twin, loss_fn, batches, MKOR.published(), "inductor")
    assert_same(model, twin, 1e-4)


@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.nightly)])
def test_two_micro_batches_equal_one_batch(name):
    model, loss_fn, batches = zoo.build(name)
    batches = [(x[: len(x) // 2 * 2], y[: len(y) // 2 * 2]) for x, y in batches]
    twin = copy.deepcopy(model)
    train_drop_in(model, loss_fn, batches, MKOR.published())
    train_drop_in(twin, loss_fn, batches, MKOR.published(), micro_batches=2)
    assert_same(model, twin, 1e-6)


def test_keys_parameters_and_class_stay_the_users():
    model, _, batches = zoo.build("cnn")
    compiled = mkor_fx.compile(model, backend="eager")
    assert compiled.__class__ is type(model) and isinstance(compiled, type(model))
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert [n for n, _ in compiled.named_modules()] == [n for n, _ in model.named_modules()]
    compiled.load_state_dict(copy.deepcopy(model).state_dict())
    assert "mkor" not in vars(model)
    plain = copy.deepcopy(compiled)
    assert plain(batches[0][0]).shape == model(batches[0][0]).shape


def test_eval_and_no_grad_add_nothing():
    model, loss_fn, batches = zoo.build("cnn")
    compiled = mkor_fx.compile(model, backend="eager")
    x, y = batches[0]
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.eval()(x))
    assert not list(compiled.graphs)
    assert compiled.mkor.state_dict().keys() == {"step"}
    compiled.train()
    loss_fn(compiled(x), y).backward()
    assert compiled.graphs.captured and all(p.grad is not None for p in model.parameters())


def test_raw_gradients_are_the_users_before_and_after_the_step():
    model, loss_fn, batches = zoo.build("mlp", dtype=torch.float64)
    twin = copy.deepcopy(model)
    compiled = mkor_fx.compile(model, FLOAT64, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batches[0]
    loss_fn(compiled(x), y).backward()
    loss_fn(twin(x), y).backward()
    before = [p.grad for p in model.parameters()]
    optimizer.step()
    for p, q, raw in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert p.grad is raw
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("name", [pytest.param("gpt", marks=pytest.mark.nightly), "cnn", "checkpointed"])
def test_fullgraph_in_both_doors(name):
    options = {"dropout": 0.3} if name == "checkpointed" else {}
    model, loss_fn, batches = zoo.build(name, steps=3, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    step = mkor_fx.compile_step(model, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-3), backend="eager")
    assert all(torch.isfinite(step(x, y)) for x, y in batches)
    losses, _ = train_drop_in(twin, loss_fn, batches, MKOR.published(), fullgraph=True)
    assert all(torch.isfinite(loss) for loss in losses)
    for trained in (model, twin):
        assert all(not torch.equal(before[key], value) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_dropout_in_a_checkpoint_uses_one_mask_forward_and_backward(backend):
    """A linear function of its dropped-out input: the gradient shows the mask of the backward, the loss the forward's."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64, 1))

        def forward(self, x):
            def block(x):
                return functional.dropout(x * 2, 0.5) @ self.scale

            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum()

    model = Dropped()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = mkor_fx.compile_step(model, None, optimizer, None, backend=backend)
    loss = step(torch.ones(1, 64))
    gradient = 1 - model.scale.detach()  # lr = 1
    assert 0 < (gradient == 0).sum() < 64
    torch.testing.assert_close(gradient.sum(), loss)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "attribute"])
def test_a_model_that_returns_its_own_loss(form):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            out = self.layer(x)
            loss = functional.mse_loss(out, labels)
            packed = {"tensor": loss, "tuple": (loss, out), "dict": {"loss": loss, "out": out}}
            return packed.get(form) if form != "attribute" else Output(loss, out)

    model = Own()
    step = mkor_fx.compile_step(model, None, torch.optim.SGD(model.parameters(), lr=0.1), backend="eager")
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    expected = functional.mse_loss(model.layer(x), y).detach()
    torch.testing.assert_close(step(x, labels=y), expected)


class Output:
    def __init__(self, loss, out):
        self.loss, self.out = loss, out


def test_outputs_are_returned_detached():
    model, loss_fn, batches = zoo.build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, backend="eager", return_outputs=True)
    x, y = batches[0]
    expected = model(x).detach().clone()
    loss, outputs = step(x, y)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(loss, loss_fn(expected, y))
    assert not outputs.requires_grad


def test_skipped_parameters_keep_their_raw_gradient():
    model, loss_fn, batches = zoo.build("mlp")
    step = mkor_fx.compile_step(
        model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), backend="eager", skip=["head.*"]
    , rule=mkor_fx.MKOR.published())
    step(*batches[0])
    declined = {e.name: e.declined.reason for e in step.coverage.declined}
    assert set(declined) == {n for n, _ in model.named_parameters() if n.startswith("head.")}
    assert all("head.*" in reason for reason in declined.values())


class ReadLayout(CustomGraphPass):
    """Ends a compilation with Inductor's option of layout."""

    def __call__(self, graph):
        raise RuntimeError(f"channels last: {inductor.layout_optimization}")

    def uuid(self):
        return None


@pytest.mark.parametrize(
    "rule, options, forced, expected",
    [
        (None, {}, False, False), (MKOR(), {}, False, False), (MKOR(), {"layout_optimization": True}, False, True),
        (None, {}, True, True),
    ],
    ids=["no rule", "MKOR", "an option", "forced"],
)  # fmt: skip
def test_a_step_of_convolutions_keeps_their_order_unless_told_otherwise(rule, options, forced, expected):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 2))
    options = {**options, "post_grad_custom_post_pass": ReadLayout()}
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    step = mkor_fx.compile_step(model, functional.mse_loss, sgd, rule=rule, options=options)
    told = pytest.raises(InductorError, match=f"channels last: {expected}")
    with inductor.patch(force_layout_optimization=forced), told:
        step(torch.randn(4, 1, 8, 8), torch.randn(4, 2))
