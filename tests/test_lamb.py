"""LAMB: its first step in closed form, beside an independent reference and an installable class, alone and compiled."""

import copy

import numpy as np
import processes
import pytest
import stepping
import torch
from torch import nn
from torch.nn import functional

from mkor_fx import MKOR
from mkor_fx.optim import LAMB
from mkor_fx.runtime.base_step import base_step_of

CONVENTIONS = {
    "apex": (LAMB, {}),
    "without corrections": (LAMB, {"bias_correction": False, "max_grad_norm": 0.05}),
    "all tensors": (LAMB, {"adapt_all": True, "max_grad_norm": None}),
    "deepspeed": (LAMB.deepspeed, {}),
    "deepspeed, bounds that bind": (LAMB.deepspeed, {"weight_decay": 0.1, "trust": (0.5, 2.0)}),
}


class Reference:
    """In numpy; ``groups``: lists of arrays, each with its options."""

    def __init__(self, groups):
        zeros = lambda arrays: [[np.zeros_like(a), np.zeros_like(a)] for a in arrays]
        self.t, self.groups = 0, [(arrays, options, zeros(arrays)) for arrays, options in groups]

    def step(self, grads):
        self.t += 1
        norm = np.sqrt(sum((g**2).sum() for group in grads for g in group))
        for (arrays, o, moments), own in zip(self.groups, grads, strict=True):
            (b1, b2), limit = o["betas"], o["max_grad_norm"]
            for p, g, (m, v) in zip(arrays, own, moments, strict=True):
                g = g / max(1, norm / limit) if limit else g
                m[...] = b1 * m + (1 - b1) * g
                v[...] = b2 * v + (1 - b2) * g**2
                c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if o["bias_correction"] else (1, 1)
                u = m / c1 / (np.sqrt(v / c2) + o["eps"]) + o["weight_decay"] * p
                r = np.linalg.norm(p) / np.linalg.norm(u) if p.any() and u.any() else 1
                r = np.clip(r, *o["trust"]) if o["trust"] and p.any() and u.any() else r
                p -= o["lr"] * (r if o["adapt_all"] or o["weight_decay"] else 1) * u


def build(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        model[3].weight.zero_()  # no norm at first
    data = [(torch.randn(16, 6, dtype=dtype), torch.randint(4, (16,))) for _ in range(12)]
    return model, data


def groups(model):
    parts = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    return [{"params": params, **options} for params, options in zip(parts, ({}, {"weight_decay": 0.0}), strict=True)]


def stepper(door, model, optimizer, rule=None, backend="eager"):
    return stepping.stepper(door, model, functional.cross_entropy, optimizer, rule, backend)[1]


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_first_step_is_the_sign_at_the_size_of_the_weight(scale, bias_correction):
    p = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    before, p.grad = p.detach().clone(), scale * torch.randn(5, 7, dtype=torch.float64)
    options = {"weight_decay": 0.0, "eps": 0.0, "bias_correction": bias_correction, "max_grad_norm": None}
    LAMB([p], lr=0.01, adapt_all=True, **options).step()
    expected = -0.01 * before.norm() / 35**0.5 * p.grad.sign()
    torch.testing.assert_close(p.detach() - before, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("door", ["eager", "compile_step"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_beside_the_reference(name, door):
    model, data = build()
    make, options = CONVENTIONS[name]
    optimizer = make(groups(model), lr=0.02, **options)
    of = {p: n for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    mirror = dict(twin.named_parameters())
    tensors = [[mirror[of[p]] for p in group["params"]] for group in optimizer.param_groups]
    arrays = [[t.detach().numpy() for t in group] for group in tensors]  # one memory with the twin's weights
    reference = Reference(list(zip(arrays, optimizer.param_groups, strict=True)))
    step = stepper(door, model, optimizer)
    for x, y in data:
        grads = torch.autograd.grad(functional.cross_entropy(twin(x), y), [t for group in tensors for t in group])
        grads = iter([g.numpy() for g in grads])
        reference.step([[next(grads) for _ in group] for group in tensors])
        step(x, y)
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), mirror[n].detach(), rtol=1e-10, atol=1e-10, msg=n)


def test_beside_an_installable_class():
    """Without bias corrections, which that class applies to the step's length, and where its bound of 10 does not bind."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="installed by make test")
    model, data = build()
    twin, wd = copy.deepcopy(model), 0.05
    own = LAMB(model.parameters(), 0.02, eps=1e-13, weight_decay=wd, bias_correction=False, adapt_all=True)
    other = pytorch_optimizer.Lamb(
        twin.parameters(), 0.02, eps=1e-13, weight_decay=wd, weight_decouple=False, adam_debias=True, pre_norm=True
    )
    for x, y in data:
        for network, optimizer in ((model, own), (twin, other)):
            optimizer.zero_grad()
            functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_inductor_and_a_schedule_without_another_program():
    model, data = build(torch.float32)
    twin = copy.deepcopy(model)
    own, other = LAMB(groups(model), lr=0.02), LAMB(groups(twin), lr=0.02)
    step, plain = stepper("compile_step", model, own, backend="inductor"), stepper("eager", twin, other)
    for count, (x, y) in enumerate(data):
        for optimizer in (own, other):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + count)
        step(x, y)
        plain(x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-5)
    assert step.compilations == 1


@pytest.mark.parametrize("door", ["compile", "compile_step"])
def test_mkor_in_front_takes_its_trust_ratio(door):
    model, data = build()
    nn.init.normal_(model[3].weight)
    optimizer = LAMB(model.parameters(), lr=0.03, weight_decay=0.0, adapt_all=True)
    step = stepper(door, model, optimizer, MKOR())
    before = model[0].weight.detach().clone()
    step(*data[0])
    moved = (model[0].weight.detach() - before).norm()
    torch.testing.assert_close(moved, 0.03 * before.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("door", ["compile", "compile_step"])
def test_mkor_in_front_keeps_to_the_bounds_of_the_ratio(door):
    """Upper bounds far below the ratio of the norms: steps are as long as they say, when they change as well."""
    model, data = build()
    nn.init.normal_(model[3].weight)
    optimizer = LAMB(model.parameters(), lr=0.03, weight_decay=0.0, adapt_all=True, trust=(0.0, 1e-3))
    step = stepper(door, model, optimizer, MKOR())
    moved = []
    for bound in (1e-3, 1e-3, 4e-3):
        optimizer.param_groups[0]["trust"] = (0.0, bound)
        before = model[0].weight.detach().clone()
        step(*data[0])
        moved.append(float((model[0].weight.detach() - before).norm() / before.norm()))
    assert 0 < moved[0] < 0.003 and moved[1] == pytest.approx(moved[0], rel=0.5) and 3 < moved[2] / moved[1] < 5


def test_without_a_trust_ratio_it_is_adam_to_a_rule():
    model, _ = build()
    kinds = [[base_step_of(make(groups(model)), at).kind for at in (0, 1)] for make in (LAMB, LAMB.deepspeed)]
    assert kinds == [["trust", "adam"], ["trust", "trust"]]


def on_a_rank(rank, size):
    model, data = build()
    step = stepper("compile_step", model, LAMB(groups(model), lr=0.02))
    for x, y in data:
        step(x.chunk(size)[rank], y.chunk(size)[rank])
    return {name: p.detach() for name, p in model.named_parameters()}


def test_two_ranks_are_one_process():
    alone = on_a_rank(0, 1)
    for weights in processes.values(on_a_rank, 2):
        for name, p in weights.items():
            torch.testing.assert_close(p, alone[name], rtol=1e-10, atol=1e-10)


def test_state_goes_round():
    model, data = build()
    optimizer = LAMB(groups(model), lr=0.02)
    step = stepper("eager", model, optimizer)
    for batch in data[:5]:
        step(*batch)
    again = copy.deepcopy(model)
    other = LAMB(groups(again), lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = stepper("compile_step", again, other)
    for batch in data[5:]:
        step(*batch)
        resumed(*batch)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_thousand_steps_in_bfloat16():
    model, data = build(torch.bfloat16)
    optimizer = LAMB(groups(model), lr=0.01)
    step = stepper("eager", model, optimizer)
    for count in range(1000):
        step(*data[count % len(data)])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    again = LAMB(groups(model), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, again):
        assert {t.dtype for state in one.state.values() for t in state.values()} == {torch.float32}
    first = model[0].weight
    assert torch.equal(again.state[first]["exp_avg_sq"], optimizer.state[first]["exp_avg_sq"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, r"LAMB\(lr=-1\.0\): must not be negative"),
        ({"betas": (0.9, 1.0)}, r"LAMB\(betas=\(0\.9, 1\.0\)\): .*must lie in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, r"LAMB\(max_grad_norm=0\.0\): must be positive; None"),
        ({"trust": (2.0, 1.0)}, r"LAMB\(trust=\(2\.0, 1\.0\)\): bounds of a ratio"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LAMB([nn.Parameter(torch.ones(2))], **options)


def test_sparse_gradients_are_refused_and_closures_called():
    p = nn.Parameter(torch.ones(3))
    optimizer = LAMB([p])
    assert optimizer.step(lambda: "loss") == "loss"
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"no sparse gradients: use torch\.optim\.SparseAdam"):
        optimizer.step()
