"""A handle and its model are one truth: attributes, modes, counters, methods; and two handles of one encoder."""

import copy
import inspect
import pickle

import pytest
import torch
from test_hooks import RULE, close
from test_lockstep import reference_for
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR


class Net(nn.Module):
    """Things that people put on modules: a number, a counter, a buffer, a property, methods."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.calls = nn.Linear(8, 4), 1.0, 0
        self.register_buffer("seen", torch.zeros(()))

    @property
    def doubled(self):
        return 2 * self.scale

    def forward(self, x, dropped=0.5):
        self.calls += 1
        self.seen += len(x)
        return functional.dropout(self.scale * self.inner(x), dropped, training=self.training)

    def training_step(self, x):
        return self(x, dropped=0.0).square().mean()

    def raw_step(self, x):
        return self.inner(x).square().mean()


def compiled(**options):
    torch.manual_seed(0)
    model = Net()
    return model, mkor_fx.compile(model, RULE, backend="eager", **options)


X = torch.randn(16, 8)


# ---- one truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["model", "handle"])
def test_modes_and_attributes_set_on_one_are_seen_on_the_other(first):
    model, handle = compiled()
    one, other = (model, handle) if first == "model" else (handle, model)
    assert one.eval() is one and not other.training and not other.inner.training
    assert torch.equal(handle(X), handle(X))
    assert one.train() is one and other.training
    assert not torch.equal(handle(X), handle(X))
    one.eval()
    before = handle(X)
    one.scale = 3.0
    assert other.scale == 3.0 and other.doubled == 6.0
    torch.testing.assert_close(handle(X), 3 * before)
    one.extra = nn.Linear(2, 2)
    assert other.extra is one.extra and "extra.weight" in other.state_dict()
    del one.extra
    assert not hasattr(other, "extra")
    one.inner.weight.requires_grad_(False)
    assert not other.inner.weight.requires_grad


def test_counters_and_buffers_count_once():
    model, handle = compiled()
    for _ in range(3):
        handle(X)
    assert model.calls == handle.calls == 3
    assert float(model.seen) == float(handle.seen) == 48


def test_it_is_the_model_to_whoever_asks():
    model, handle = compiled()
    assert isinstance(handle, Net) and handle.__class__ is Net and handle.__class__.__name__ == "Net"
    assert type(handle).__name__ == "Net" and issubclass(type(handle), Net)
    assert handle.inner is model.inner and next(handle.parameters()) is model.inner.weight
    assert handle.state_dict().keys() == model.state_dict().keys() and repr(handle) == repr(model)
    assert set(vars(handle)) == set(vars(model)) and not any("mkor" in name for name in vars(model))
    assert [name for name, _ in handle.named_modules()] == [name for name, _ in model.named_modules()]
    handle.to(torch.float64)
    assert model.inner.weight.dtype == torch.float64


def test_apply_and_functions_that_return_self_give_the_handle():
    _, handle = compiled()
    assert handle.train() is handle and handle.double() is handle and handle.requires_grad_(True) is handle
    assert handle.apply(lambda module: None) is handle


def test_copies_and_pickles_are_plain_models():
    model, handle = compiled()
    for twin in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert type(twin) is Net and not hasattr(twin, "mkor")
        assert twin.inner.weight is not model.inner.weight and torch.equal(twin.inner.weight, model.inner.weight)


def test_what_a_model_has_itself_stays_its_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.graphs, self.inner = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.inner(self.graphs(x))

    model = Named()
    handle = mkor_fx.compile(model, backend="eager")
    assert handle.graphs is model.graphs and handle(X).shape == (16, 4) and handle.mkor.step == 0


def test_forward_hooks_of_the_model_run():
    model, handle = compiled()
    seen = []
    model.register_forward_hook(lambda module, x, y: seen.append(type(module)))
    handle(X)
    assert len(seen) == 1


# ---- ways of calling it ---------------------------------------------------------------------------------------------------


def trained(call, handle, steps=3):
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        call(X).backward()
        optimizer.step()
    return handle.mkor.step


def test_forward_and_methods_that_call_the_handle_are_compiled():
    _, handle = compiled()
    assert trained(lambda x: handle.forward(x, dropped=0.0).square().mean(), handle) == 3
    _, handle = compiled()
    assert trained(handle.training_step, handle) == 3


def test_other_methods_say_that_only_forward_is_compiled():
    _, handle = compiled()
    with pytest.warns(UserWarning, match=r"inner\.weight.*was not called.*Only its forward is compiled.*not another method"):
        assert trained(handle.raw_step, handle) == 0


def test_so_does_the_model_under_its_first_name():
    model, handle = compiled()
    with pytest.warns(UserWarning, match="where it is called itself: not the model that it was made of"):
        assert trained(lambda x: model(x).square().mean(), handle) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_of_a_torch_compile_it_is_called_as_it_is(backend):
    _, handle = compiled()
    _, alone = compiled()
    outer = torch.compile(handle, backend=backend)
    assert trained(lambda x: outer(x, dropped=0.0).square().mean(), handle) == 3
    assert trained(lambda x: alone(x, dropped=0.0).square().mean(), alone) == 3
    close(handle, alone, 1e-6)


def test_inside_of_a_compiled_function_and_of_another_module():
    _, handle = compiled()
    loss = torch.compile(lambda x: handle(x, dropped=0.0).square().mean(), backend="aot_eager")
    assert trained(loss, handle) == 3

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = compiled()[1]

        def forward(self, x):
            return self.net(x, dropped=0.0).square().mean()

    outer = Outer()
    assert trained(outer, outer.net) == 3


def test_its_own_compile_is_refused():
    _, handle = compiled()
    with pytest.raises(RuntimeError, match=r"this Net is compiled already: mkor_fx\.compile stands in the place of"):
        handle.compile(backend="eager")


def test_a_first_call_under_func():
    model, handle = compiled()
    model.eval()
    per_sample = torch.func.vmap(torch.func.grad(lambda row: handle.inner(row).sum()))(X)
    torch.testing.assert_close(per_sample, model.inner.weight.sum(0).expand(16, 8))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    handle = mkor_fx.compile(model, backend="eager")
    found = torch.func.vmap(torch.func.grad(lambda row: handle(row).sum()))(X)
    expected = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(X)
    torch.testing.assert_close(found, expected)
    assert trained(lambda x: handle(x).square().mean(), handle) == 3  # and trains afterwards


# ---- an encoder of several handles ----------------------------------------------------------------------------------------


def actor_and_critic():
    torch.manual_seed(0)
    encoder = nn.Linear(8, 16).double()
    actor, critic = (nn.Sequential(encoder, nn.Tanh(), nn.Linear(16, n).double()) for n in (4, 3))
    return encoder, actor, critic


def losses(actor, critic, x):
    return actor(x).square().mean() + 0.5 * critic(x).square().mean()


@pytest.mark.parametrize("loss", ["one", "two"])
def test_a_shared_encoder_is_preconditioned_once_from_the_statistics_of_both(loss):
    """As it is in one model that holds both heads."""
    encoder, actor, critic = actor_and_critic()
    handles = [mkor_fx.compile(model, RULE, backend="eager") for model in (actor, critic)]
    _, *twins = actor_and_critic()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor, self.critic = twins

        def forward(self, x):
            return losses(self.actor, self.critic, x)

    both = Both()
    params = dict.fromkeys([*actor.parameters(), *critic.parameters()])
    optimizer, other = torch.optim.SGD(params, lr=0.1), torch.optim.SGD(both.parameters(), lr=0.1)
    reference = reference_for(both, RULE, other)
    for _ in range(3):
        x = torch.randn(32, 8, dtype=torch.float64)
        optimizer.zero_grad()
        if loss == "one":
            losses(*handles, x).backward()
        else:
            handles[0](x).square().mean().backward()
            (0.5 * handles[1](x).square().mean()).backward()
        raw = encoder.weight.grad.clone()
        optimizer.step()
        assert torch.equal(encoder.weight.grad, raw)
        both(x).backward()
        reference.step()
        for model, twin in zip((actor, critic), twins, strict=True):
            close(model, twin, 1e-9)


def test_two_handles_with_optimizers_of_their_own_step_in_turn():
    """Each optimizer holds the encoder, as in alternating training: each step is the one of its own loss."""
    encoder, actor, critic = actor_and_critic()
    handles = [mkor_fx.compile(model, RULE, backend="eager") for model in (actor, critic)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (actor, critic)]
    for _ in range(2):
        for handle, optimizer in zip(handles, optimizers, strict=True):
            x, before = torch.randn(32, 8, dtype=torch.float64), encoder.weight.detach().clone()
            optimizer.zero_grad()
            handle(x).square().mean().backward()
            raw = encoder.weight.grad.clone()
            optimizer.step()
            assert torch.equal(encoder.weight.grad, raw)
            moved = (before - encoder.weight.detach()) / 0.1
            torch.testing.assert_close(moved.norm(), raw.norm())  # rescaled, so once
            assert not torch.allclose(moved, raw)
    assert [handle.mkor.step for handle in handles] == [2, 2]


def test_handles_of_a_model_and_of_its_part():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    whole, part = (mkor_fx.compile(m, MKOR.published(), backend="eager") for m in (model, model[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (whole, part, whole):
        optimizer.zero_grad()
        call(torch.randn(16, 8, dtype=torch.float64)).square().mean().backward()
        raw = model[0].weight.grad.clone()
        before = model[0].weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(((before - model[0].weight.detach()) / 0.1).norm(), raw.norm())
    assert (whole.mkor.step, part.mkor.step) == (2, 1)


# ---- its class ------------------------------------------------------------------------------------------------------------


def test_another_of_its_kind_is_a_plain_model_of_its_own():
    """As a target network, ``type(q)()``."""
    model, handle = compiled()
    target = type(handle)()
    assert type(target) is Net and not hasattr(target, "mkor")
    torch.testing.assert_close(target.eval()(X), target.inner(X))
    assert not torch.equal(target.inner.weight, model.inner.weight)


def test_a_registry_of_classes_knows_the_users_own():
    registry = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key):
            registry[key] = cls

    class One(Registered, key="one"):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x):
            return self.inner(x)

    handle = mkor_fx.compile(One(), backend="eager")
    assert registry == {"one": One} and isinstance(handle, One) and handle(X).shape == (16, 4)


def test_its_forward_has_the_signature_of_the_models():
    model, handle = compiled()
    assert inspect.signature(handle.forward) == inspect.signature(model.forward)


def test_a_class_that_has_such_a_name_keeps_it():
    class Covered(nn.Linear):
        @property
        def coverage(self):
            return "mine"

    handle = mkor_fx.compile(Covered(8, 4), backend="eager")
    assert handle.coverage == "mine" and handle.mkor.step == 0


def test_a_handle_compiled_again_is_another_handle_of_the_model():
    """A cell of a notebook that runs twice."""
    model, handle = compiled()
    again = mkor_fx.compile(handle, RULE, backend="eager")
    assert again.__class__ is Net and vars(again) is vars(model)
    assert trained(lambda x: again(x, dropped=0.0).square().mean(), again) == 3 and handle.mkor.step == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(again, lambda out, y: (out - y).square().mean(), optimizer, RULE, backend="eager")
    step(X, torch.randn(16, 4))
    assert step.mkor.step == 1


def test_what_torch_has_compiled_is_refused():
    with pytest.raises(ValueError, match=r"compiled by torch\.compile already.*model\._orig_mod"):
        mkor_fx.compile(torch.compile(Net()), backend="eager")


def test_its_class_cannot_be_changed():
    handle = mkor_fx.compile(nn.Linear(8, 4), backend="eager")
    with pytest.raises(RuntimeError, match=r"this Linear is compiled.*parametrize it before mkor_fx\.compile"):
        nn.utils.parametrizations.weight_norm(handle)
