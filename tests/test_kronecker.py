"""Kronecker-product layers beside the materialised product and beside torch's cells, and both factors as weights."""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import Contract
from joint import capture, rows
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mkor_fx
from mkor_fx import KFAC, MKOR
from mkor_fx.ir import INPUTS_FIRST
from mkor_fx.nn import Kronecker, KroneckerGRUCell, KroneckerLSTMCell, KroneckerRNNCell
from mkor_fx.nn.kronecker import largest_divisor

DOORS = ["compile_step", "compile"]
#: the other door in the same test is nightly where either sees what the other does
EITHER = ["compile_step", pytest.param("compile", marks=pytest.mark.nightly)]
CELLS = {KroneckerRNNCell: nn.RNNCell, KroneckerGRUCell: nn.GRUCell, KroneckerLSTMCell: nn.LSTMCell}


def loss_fn(outputs, target):
    return (outputs.tanh() - target).square().mean()


def close(value, expected, tolerance=1e-10):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


class Materialised(nn.Module):
    """The same layer by ``torch.kron``; ``function(self, x)`` says how."""

    def __init__(self, like, function=lambda layer, x: F.linear(x, layer.scale * torch.kron(layer.A, layer.B), layer.bias)):
        super().__init__()
        self.A, self.B, self.bias = (None if p is None else nn.Parameter(p.detach().clone()) for p in
                                     (like.A, like.B, like.bias))  # fmt: skip
        self.scale, self.function = like.scale, function

    def forward(self, x):
        return self.function(self, x)


class TwoLayers(nn.Module):
    """The same layer as two layers of torch, for a reference that watches those. ``[*, I]`` is ``[*, a2, b2]``."""

    def __init__(self, like):
        super().__init__()
        self.A, self.B = (nn.Linear(p.shape[1], p.shape[0], bias=False, dtype=p.dtype) for p in (like.A, like.B))
        self.A.weight, self.B.weight = (nn.Parameter(p.detach().clone()) for p in (like.A, like.B))
        self.bias, self.scale = None if like.bias is None else nn.Parameter(like.bias.detach().clone()), like.scale
        self.base = None if like.base is None else copy.deepcopy(like.base)

    def forward(self, x):
        X = x.unflatten(-1, (-1, self.B.in_features))
        y = self.scale * self.A(self.B(X).transpose(-1, -2)).transpose(-1, -2).flatten(-2)
        return y + (self.base(x) if self.base is not None else 0 if self.bias is None else self.bias)


def stepper(door, model, optimizer, rule, **options):
    if door == "compile_step":
        return mkor_fx.compile_step(model, loss_fn, optimizer, rule, backend="eager", **options)
    run = model if rule is None else mkor_fx.compile(model, rule, backend="eager", **options)

    def step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(run(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.mkor, step.coverage = getattr(run, "mkor", None), getattr(run, "coverage", None)
    return step


# ---- the layer ------------------------------------------------------------------------------------------------------

LAYERS = {
    "near square": lambda: Kronecker(30, 20),
    "without bias": lambda: Kronecker(30, 20, bias=False),
    "scaled": lambda: Kronecker(30, 20, scale=-0.7),
    "a row": lambda: Kronecker(6, 7, left=(1, 3)),
    "a column": lambda: Kronecker(5, 8, left=(4, 1)),
    "large left factor": lambda: Kronecker(12, 18, left=(9, 6)),
}


@pytest.mark.parametrize("lead", [(7,), (), (2, 3, 5)])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_product(name, lead):
    layer = LAYERS[name]().double()
    x = torch.randn(*lead, layer.in_features).double().requires_grad_()
    W = (layer.scale * torch.kron(layer.A, layer.B)).requires_grad_()
    expected = F.linear(x, W, layer.bias)
    close(layer(x), expected)
    g = torch.randn_like(expected)
    parameters = [p for p in (x, layer.A, layer.B, layer.bias) if p is not None]
    own, other = (torch.autograd.grad(y, parameters, g, retain_graph=True) for y in (layer(x), expected))
    for one, two in zip(own, other):
        close(one, two)
    (dW,) = torch.autograd.grad(expected, W, g)  # dA[i, j] = s sum_kl dW[i b1 + k, j b2 + l] B[k, l]
    blocks = dW.reshape(layer.A.shape[0], layer.B.shape[0], layer.A.shape[1], layer.B.shape[1])
    (dA,) = torch.autograd.grad(layer(x), layer.A, g)
    close(dA, layer.scale * torch.einsum("ikjl,kl->ij", blocks, layer.B))


@pytest.mark.parametrize("name", LAYERS)
def test_merged_it_is_a_plain_layer_of_its_own(name):
    layer, x = LAYERS[name]().double(), torch.randn(4, LAYERS[name]().in_features).double()
    merged = layer.merge()
    assert type(merged) is nn.Linear and all(p.requires_grad for p in merged.parameters())
    assert torch.linalg.matrix_rank(merged.weight) == torch.linalg.matrix_rank(layer.A) * torch.linalg.matrix_rank(layer.B)
    before = layer(x)
    close(merged(x), before)
    nn.init.zeros_(merged.weight)
    close(layer(x), before, 0)


def test_shapes_are_near_square_and_the_left_factor_the_smaller():
    assert [largest_divisor(n) for n in (1, 2, 7, 12, 36, 1024, 4097)] == [1, 1, 1, 3, 6, 32, 17]
    layer = Kronecker(30, 20)
    assert (layer.A.shape, layer.B.shape) == ((4, 5), (5, 6))
    assert repr(layer) == "Kronecker(30, 20, A=(4, 5), B=(5, 6), bias=True)"
    assert Kronecker(7, 12).A.shape == (3, 1)


def test_weights_start_as_large_as_those_of_a_plain_layer():
    layer, plain = Kronecker(4096, 4096), nn.Linear(4096, 4096)
    assert abs(layer.materialise().std() / plain.weight.std() - 1) < 0.05
    assert abs(layer.bias.std() / plain.bias.std() - 1) < 0.05
    assert layer.A.abs().max() <= (3**0.5 / 64) ** 0.5
    before = layer.A.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.A, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_when_merged(dtype):
    layer = Kronecker(30, 20, scale=0.3).to(dtype)
    expected = (0.3 * torch.kron(layer.A.double(), layer.B.double())).to(dtype)
    assert layer.materialise().dtype == layer.merge().weight.dtype == dtype
    close(layer.materialise().double(), expected.double(), 1e-3)
    x = torch.randn(9, 30)
    close(layer(x.to(dtype)).float(), layer.float()(x), 2e-2)


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["left", "right"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_starts_at_its_base_and_leaves_it_alone(zero, bias):
    linear = nn.Linear(30, 20, bias=bias).double()
    x, saved = torch.randn(7, 30).double(), copy.deepcopy(linear.state_dict())
    adapter = Kronecker.adapt(linear, zero=zero, scale=0.5)
    close(adapter(x), linear(x), 0)
    assert adapter.base is linear and adapter.bias is None and adapter.A.dtype == torch.float64
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["A", "B"]
    assert adapter.A.any() == (zero == "right") and adapter.B.any() == (zero == "left")
    loss_fn(adapter(x), 1.0).backward()  # the factor that is zero has a gradient, so that the other has one after a step
    assert adapter.A.grad.any() == (zero == "left") and adapter.B.grad.any() == (zero == "right")

    nn.init.normal_(adapter.A), nn.init.normal_(adapter.B)
    W = linear.weight + 0.5 * torch.kron(adapter.A, adapter.B)
    close(adapter(x), F.linear(x, W, linear.bias))
    close(adapter.merge()(x), adapter(x))
    assert (adapter.merge().bias is None) is not bias
    assert all(torch.equal(value, saved[name]) for name, value in linear.state_dict().items())


@pytest.mark.parametrize("door", EITHER)
def test_an_adapter_trains_from_zero_on(door):
    torch.manual_seed(0)
    linear = nn.Linear(30, 20)
    saved, model = copy.deepcopy(linear.state_dict()), Kronecker.adapt(linear)
    step = stepper(door, model, torch.optim.Adam([model.A, model.B], lr=0.03), MKOR())
    x, start, teacher = torch.randn(64, 30), model.B.detach().clone(), copy.deepcopy(model)
    with torch.no_grad():
        nn.init.normal_(teacher.A, std=0.5)
        y = teacher(x).tanh()
    losses = [step(x, y)]
    assert model.A.any() and torch.equal(model.B, start)  # its gradient was zero
    losses += [step(x, y) for _ in range(20)]
    assert not torch.equal(model.B, start)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, saved[name]) for name, value in linear.state_dict().items())


# ---- cells ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_torchs_with_the_products_for_weights(kind, bias, given):
    own, other = kind(6, 8, bias).double(), CELLS[kind](6, 8, bias).double()
    for suffix, part in (("ih", own.input), ("hh", own.hidden)):
        getattr(other, f"weight_{suffix}").data = part.materialise()
        if bias:
            getattr(other, f"bias_{suffix}").data = part.bias.detach()
    state = torch.randn(3, 8).double() if given else None
    if kind is KroneckerLSTMCell and given:
        state = (state, torch.randn(3, 8).double())
    for _ in range(3):
        x = torch.randn(3, 6).double()
        made, expected = own(x, state), other(x, state)
        state = expected
        for one, two in zip(*([s] if isinstance(s, torch.Tensor) else s for s in (made, expected))):
            close(one, two)


class Sequence(nn.Module):
    """``[N, T, I] -> [N, H]``: the last state."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state if isinstance(state, torch.Tensor) else state[0]


# ---- both factors are weights ---------------------------------------------------------------------------------------


def of_shared(layer, x):
    W = torch.kron(layer.A, layer.B)
    return F.linear(F.linear(x, W)[:, : x.shape[1]].tanh(), W)


USES = {
    "out-in": lambda layer, x: F.linear(x, torch.kron(layer.A, layer.B)),
    "in-out": lambda layer, x: x @ torch.kron(layer.A, layer.B).T,
    "stacked": lambda layer, x: F.linear(x.unflatten(0, (-1, 2)), torch.kron(layer.A, layer.B), layer.bias),
    "scaled": lambda layer, x: F.linear(x, -1.5 * torch.kron(layer.A, layer.B)),
    "scaled by a weight": lambda layer, x: F.linear(x, layer.bias[0] * torch.kron(layer.A, layer.B)),
    "added": lambda layer, x: F.linear(x, torch.ones(20, 15).to(x) + 2.0 * torch.kron(layer.A, layer.B)),
    "by hand": lambda layer, x: F.linear(x, (layer.A[:, None, :, None] * layer.B[None, :, None]).reshape(20, 15)),
    "by einsum": lambda layer, x: F.linear(x, torch.einsum("ij,kl->ikjl", layer.A, layer.B).reshape(20, 15)),
    "kernel": lambda layer, x: F.conv1d(x[:, :, None], torch.kron(layer.A, layer.B)[:, :, None])[:, :, 0],
    "shared": of_shared,
    "twice": lambda layer, x: F.linear(F.linear(x, torch.kron(layer.A, layer.B))[:, :15], torch.kron(layer.A, layer.B)),
}


@pytest.mark.parametrize("name", ["layer", *USES])
def test_rows_of_the_factors(name):
    """``A`` has ``N b1`` rows ``X B^T`` and ``s dY``, ``B`` has ``N a2`` rows ``X`` and ``s A^T dY``."""
    torch.manual_seed(0)
    layer = Kronecker(15, 20, left=(5, 3), scale=2.0 if name == "layer" else 1.0).double()
    model = layer if name == "layer" else Materialised(layer, USES[name])
    x, g = torch.randn(8, 15).double(), torch.randn(8, 20).double()
    scale = {"scaled": -1.5, "scaled by a weight": layer.bias[0].detach(), "added": 2.0, "layer": 2.0}.get(name, 1.0)

    outputs = model(x)
    gradients = dict(zip("AB", torch.autograd.grad(outputs, [model.A, model.B], g.reshape(outputs.shape))))
    (joint,) = capture(model, x)
    (seed,) = joint.step.seeds
    joint.values[joint.step.graph.find_nodes(op="placeholder").index(seed)] = g.reshape(outputs.shape)
    env = joint.run()
    A, B, X, dY = layer.A.detach(), layer.B.detach(), x.reshape(8, 3, 5), g.reshape(8, 5, 4)
    expected = {
        "A": (torch.einsum("njl,kl->nkj", X, B), scale * dY.mT),
        "B": (X, scale * torch.einsum("ij,nik->njk", A, dY)),
    }
    for factor, gradient in gradients.items():
        taps = joint.site(factor).taps
        assert {tap.op for tap in taps} == {"linear" if name == "layer" else "kronecker"}
        pairs = [(rows(env, tap.a), rows(env, tap.g)) for tap in taps]
        close(sum(g_NO.T @ a_NI for a_NI, g_NO in pairs), gradient)
        assert len(taps) == (2 if name in ("shared", "twice") else 1)
        if len(taps) == 1:
            for own, hand in zip(pairs[0], expected[factor]):
                close(own, hand.flatten(0, 1))


def test_a_product_that_is_used_the_other_way_round_as_well():
    torch.manual_seed(0)

    def both_ways(layer, x):
        W = torch.kron(layer.A, layer.B)
        return F.linear(x, W).tanh() @ W

    model, x = Materialised(Kronecker(15, 20, left=(5, 3)).double(), both_ways), torch.randn(8, 15).double()
    gradients = torch.autograd.grad(model(x).sum(), [model.A, model.B])
    (joint,) = capture(model, x)
    env = joint.run()
    for factor, gradient in zip("AB", gradients):
        taps = joint.site(factor).taps
        assert len({tap.inputs for tap in taps}) == 2
        close(sum(rows(env, tap.rows_first).T @ rows(env, tap.rows_last) for tap in taps), gradient)
        (back,) = (tap for tap in taps if tap.inputs == INPUTS_FIRST)
        H = F.linear(x, torch.kron(model.A, model.B)).tanh().reshape(8, 5, 4)  # inputs of W^T = A^T x B^T
        hand = torch.einsum("nik,kl->nli", H, model.B) if factor == "A" else H
        close(rows(env, back.a), hand.flatten(0, 1).detach())


@pytest.mark.parametrize("function", [
    lambda layer, x: F.linear(x, torch.kron(layer.A, layer.B) * torch.ones(20, 15).to(x).tril()),
    lambda layer, x: F.embedding(x.abs().long(), torch.kron(layer.A, layer.B)),
    lambda layer, x: x[:, :5] @ torch.kron(layer.A, layer.B).square().reshape(5, 60),
])  # fmt: skip
def test_what_is_no_product_of_rows_says_which_layer_to_use(function):
    model = Materialised(Kronecker(15, 20, left=(5, 3)), function)
    table = mkor_fx.explain(model, torch.randn(8, 15), torch.zeros(()), loss_fn=loss_fn)
    declined = {entry.name: str(entry.declined) for entry in table.declined}
    assert all("use mkor_fx.nn.Kronecker" in declined[name] for name in "AB")


@pytest.mark.parametrize("make", [
    lambda: Kronecker(30, 20),
    lambda: Kronecker.adapt(nn.Linear(30, 20), zero="right"),
    lambda: Materialised(Kronecker(30, 20, scale=0.5)),
    *(lambda kind=kind: Sequence(kind(30, 20)) for kind in CELLS),
])  # fmt: skip
def test_nothing_is_left_out(make):
    model = make()
    x = torch.randn(8, *([2] if isinstance(model, Sequence) else []), 30)
    table = mkor_fx.explain(model, x, torch.randn(8, 20), loss_fn=loss_fn)
    check_coverage(table, model)
    assert "A " in table.table(costs=True)


def check_coverage(table, model):
    table.assert_full()
    matrices = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2}
    assert {entry.name for entry in table.covered} == matrices


@pytest.mark.parametrize("make", [
    pytest.param(lambda: Kronecker(30, 20), marks=pytest.mark.nightly), lambda: Materialised(Kronecker(30, 20)),
])  # fmt: skip
@pytest.mark.parametrize("door", EITHER)
def test_the_batch_may_be_of_any_size(make, door):
    torch.manual_seed(0)
    model = make()
    step = stepper(door, model, torch.optim.SGD(model.parameters(), lr=0.1), MKOR.published(), dynamic=True)
    for size in (5, 8, 6):
        step(torch.randn(size, 30), torch.randn(size, 20))
    assert step.mkor.step == 3 and all(torch.isfinite(p).all() for p in model.parameters())


# ---- trajectories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_without_a_rule_it_trains_as_the_product(door):
    torch.manual_seed(0)
    layer = Kronecker(30, 20, scale=1.5).double()
    twin = Materialised(layer)
    own, other = (torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (layer, twin))
    step, plain = stepper(door, layer, own, None), stepper("compile", twin, other, None)
    for _ in range(10):
        x, y = torch.randn(8, 30).double(), torch.randn(8, 20).double()
        close(step(x, y), plain(x, y))
    for name, p in layer.named_parameters():
        close(p.detach(), twin.get_parameter(name).detach())


MKORS = {"mkor": MKOR(factor_dtype=torch.float64, rank=3), "published": MKOR.published(factor_dtype=torch.float64)}
MODELS = {
    "layer": (lambda: Kronecker(30, 20, scale=1.5), "mkor"),
    "materialised": (lambda: Materialised(Kronecker(30, 20, scale=1.5)), "mkor"),
    "adapter": (lambda: Kronecker.adapt(nn.Linear(30, 20), scale=0.5), "published"),
    # signs are drawn by row, and the reference has those of several uses in another order
    **{kind.__name__: (lambda kind=kind: Sequence(kind(12, 20)), "published") for kind in CELLS},
}
NIGHTLY = ["adapter", "KroneckerGRUCell", "KroneckerLSTMCell"]


def twin_of(model):
    """The model with two layers of torch for each Kronecker product."""
    if isinstance(model, Sequence):
        twin = copy.deepcopy(model)
        twin.cell.input, twin.cell.hidden = TwoLayers(model.cell.input), TwoLayers(model.cell.hidden)
        return twin
    if isinstance(model, Materialised):
        model.base = None
    return TwoLayers(model)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in MODELS])
def test_beside_two_layers_that_a_reference_watches(name, door):
    torch.manual_seed(0)
    make, kind = MODELS[name]
    model, rule = make().double(), MKORS[kind]
    for p in model.parameters():  # no factor at zero, where the size of a direction is rounding
        nn.init.normal_(p, std=0.2) if not p.any() else None
    twin = twin_of(model)
    held = [p for p in twin.parameters() if p.requires_grad]
    reference = Contract(twin, torch.optim.SGD(held, lr=0.1, momentum=0.9), rule)
    reference.layers = {name: layer for name, layer in reference.layers.items() if layer.weight.requires_grad}
    held = [p for p in model.parameters() if p.requires_grad]
    step = stepper(door, model, torch.optim.SGD(held, lr=0.1, momentum=0.9), rule)
    mirror = {name.removesuffix(".weight"): p for name, p in twin.named_parameters()}
    for _ in range(4):
        x = torch.randn(8, *([2, 12] if isinstance(model, Sequence) else [30])).double()
        y = torch.randn(8, 20).double()
        loss = step(x, y)
        expected = loss_fn(twin(x), y)
        expected.backward()
        reference.step()
        close(loss, expected.detach())
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(p.detach(), mirror[name].detach(), 1e-9)
    check_coverage(step.coverage, model)
    state = step.mkor.state_dict()
    factors = {f"{key.removesuffix('.weight:0')}.{n}": v for key, part in reference.state.items() for n, v in part.items()}
    assert factors.keys() == state.keys() - {"step"} and any(key.endswith("A.R") for key in factors)
    for key, factor in factors.items():
        close(state[key], factor, 1e-8)


@pytest.mark.parametrize("make", [lambda: Kronecker(30, 20, scale=1.5), lambda: Materialised(Kronecker(30, 20, scale=1.5))])
@pytest.mark.parametrize("door", DOORS)
def test_second_moments_in_closed_form(make, door):
    """``R = a^T a / rows`` and ``L = rows g^T g`` of each factor's own rows: ``N b1`` of ``A``, ``N a2`` of ``B``."""
    torch.manual_seed(0)
    N, model = 8, make().double()
    x, y = torch.randn(N, 30).double(), torch.randn(N, 20).double()
    (a1, a2), (b1, b2), s = model.A.shape, model.B.shape, model.scale
    outputs = model(x)
    (dY,) = torch.autograd.grad(loss_fn(outputs, y), outputs)
    A, B, X, dY = model.A.detach().clone(), model.B.detach().clone(), x.reshape(N, a2, b2), dY.reshape(N, a1, b1)
    step = stepper(door, model, torch.optim.SGD(model.parameters(), lr=0.1), KFAC())
    step(x, y)
    expected = dict.fromkeys(("A.L", "A.R", "B.L", "B.R"), 0)
    for n in range(N):
        for k in range(b1):
            t, g = X[n] @ B[k], s * dY[n, :, k]
            expected["A.L"] += N * b1 * torch.outer(g, g)
            expected["A.R"] += torch.outer(t, t) / (N * b1)
        for j in range(a2):
            g = s * dY[n].T @ A[:, j]
            expected["B.L"] += N * a2 * torch.outer(g, g)
            expected["B.R"] += torch.outer(X[n, j], X[n, j]) / (N * a2)
    for key, factor in expected.items():
        value = step.mkor.state_dict()[key].double()
        assert (value - factor).norm() < 1e-5 * factor.norm(), key


@pytest.mark.parametrize("door", EITHER)
def test_half_precision_trains(door):
    torch.manual_seed(0)
    model = Kronecker(30, 20).bfloat16()
    step = stepper(door, model, torch.optim.SGD(model.parameters(), lr=0.3), MKOR.published(factor_dtype=torch.bfloat16))
    x, y = torch.randn(32, 30).bfloat16(), torch.randn(32, 20).tanh().bfloat16()
    losses = [step(x, y).float() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0] and step.mkor.state_dict()["A.L"].dtype == torch.bfloat16


@pytest.mark.parametrize("door", EITHER)
def test_a_checkpoint_goes_on_as_if_nothing_had_been(door):
    torch.manual_seed(0)
    make = lambda: Kronecker.adapt(nn.Linear(30, 20))
    batches = [(torch.randn(8, 30), torch.randn(8, 20)) for _ in range(4)]

    def start(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return stepper(door, model, optimizer, MKOR.published()), optimizer

    model, resumed = make(), make()
    step, optimizer = start(model)
    for batch in batches[:2]:
        step(*batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), step.mkor.state_dict()))
    for batch in batches[2:]:
        step(*batch)

    resumed.load_state_dict(saved[0])
    again, other = start(resumed)
    other.load_state_dict(saved[1])
    again.mkor.load_state_dict(saved[2])
    for batch in batches[2:]:
        again(*batch)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kronecker(0, 4), "in_features=0"),
        (lambda: Kronecker(7, 5), "both sizes are prime.*nn.Linear"),
        (lambda: Kronecker(6, 4, left=(1, 1)), r"left=\(1, 1\).*single number"),
        (lambda: Kronecker(6, 4, left=(4, 6)), r"left=\(4, 6\).*single number"),
        (lambda: Kronecker(6, 4, left=(3, 2)), r"left=\(3, 2\).*\(4, 6\)"),
        (lambda: Kronecker(6, 4, left=(0, 2)), r"left=\(0, 2\)"),
        (lambda: Kronecker(6, 4, scale=0.0), "scale=0.0"),
        (lambda: Kronecker(6, 4, scale=float("nan")), "scale=nan"),
        (lambda: Kronecker(6, 4, zero="both"), "zero='both'"),
        (lambda: Kronecker(6, 4, base=nn.Conv1d(6, 4, 1)), "base=Conv1d"),
        (lambda: Kronecker(6, 4, base=nn.Linear(4, 6)), r"\(6, 4\), needs \(4, 6\)"),
        (lambda: Kronecker.adapt(nn.Conv1d(6, 4, 1)), r"adapt\(Conv1d\)"),
        (lambda: Kronecker(6, 4)(torch.randn(3, 5)), "5 features, needs in_features=6"),
        (lambda: KroneckerRNNCell(6, 8)(torch.randn(3, 6), torch.randn(2, 8)), r"\(2, 8\), needs \(3, 8\)"),
        (lambda: KroneckerLSTMCell(6, 8)(torch.randn(3, 6), (torch.randn(3, 8), torch.randn(3, 6))), r"needs \(3, 8\)"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_adapter_leaves_its_layer_trainable():
    linear = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="scale"):
        Kronecker.adapt(linear, scale=0.0)
    assert linear.weight.requires_grad


# ---- its page, and others' layers -----------------------------------------------------------------------------------


def test_the_page_runs_and_its_numbers_are_right():
    page = (Path(__file__).parents[1] / "docs/kronecker.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    namespace, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example.replace("optimizer)\n", "optimizer, backend='eager')\n"), namespace)
    assert namespace["losses"][-1] < 0.7 * namespace["losses"][0] and "4 of 4 matrices" in printed.getvalue()
    assert type(namespace["model"][0]) is nn.Linear and namespace["model"][2].A.shape == (2, 8)

    layer = Kronecker(1024, 1024, bias=False)
    (a1, a2), (b1, b2) = layer.A.shape, layer.B.shape
    for number in (sum(p.numel() for p in layer.parameters()), a2 * b1 * b2 + a1 * a2 * b1, a1**2 + a2**2 + b1**2 + b2**2):
        assert f"→ {number:,}" in page
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 1024))
    assert counter.get_total_flops() == 2 * 3 * 65536


@pytest.mark.nightly
def test_lokr_of_peft_is_covered():
    peft = pytest.importorskip("peft", reason="installed by make test")
    config = peft.LoKrConfig(r=16, alpha=8, target_modules=["0"], init_weights="lycoris")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 20), nn.Tanh()), config)
    table = mkor_fx.explain(model, torch.randn(8, 12), torch.randn(8, 20), loss_fn=loss_fn)
    check_coverage(table, model)
    assert {entry.op for entry in table.covered} == {"kronecker"}
