"""A batched weight trains exactly as its members do as layers of their own; so does a weight that is used in pieces."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mkor_fx
from mkor_fx import MKOR

RULE = MKOR.published(gamma=0.9, factor_dtype=torch.float64)
E, I, O = 3, 5, 4  # noqa: E741
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Stacked(nn.Module):
    """One weight ``[E, I, O]`` and one bias ``[E, O]``, if any."""

    def __init__(self, function, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, I, O) / I**0.5)
        self.bias = nn.Parameter(torch.randn(E, O)) if bias else None
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


class Apart(nn.Module):
    """The same as ``E`` linear layers."""

    def __init__(self, stacked, function):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(I, O, stacked.bias is not None) for _ in range(E))
        for e, layer in enumerate(self.layers):
            layer.weight.data = stacked.weight.detach()[e].T.clone().contiguous()
            if stacked.bias is not None:
                layer.bias.data = stacked.bias.detach()[e].clone()
        self.function = function

    def forward(self, x):
        return self.function(x, self.layers)


def train(door, model, batches):
    """SGD on the mean square of the outputs; returns factors and coverage."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = lambda out, target: (out - target).pow(2).mean()
    if door == "step":
        step = mkor_fx.compile_step(model, loss_fn, optimizer, RULE, backend="eager")
        for x in batches:
            step(x, 0.1)
        return step.mkor.state_dict(), step.coverage
    handle = mkor_fx.compile(model, RULE, backend="eager", precondition="step" if door == "drop-in" else door)
    for x in batches:
        optimizer.zero_grad()
        loss_fn(handle(x), 0.1).backward()
        optimizer.step()
    return handle.mkor.state_dict(), handle.coverage


DOORS = ["step", "backward"]
BATCHED = {
    # name: (with one weight, with layers of their own, shape of an input, whether there is a bias)
    "bmm": (lambda x, w, b: torch.bmm(x, w) + b[:, None], lambda x, ls: torch.stack([f(y) for f, y in zip(ls, x)]),
            (E, 7, I), True),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b[:, None], x, w), lambda x, ls: torch.stack([f(y) for f, y in zip(ls, x)]),
                (E, 7, I), True),
    "einsum": (lambda x, w, b: torch.einsum("nei,eio->neo", x, w),
               lambda x, ls: torch.stack([f(x[:, e]) for e, f in enumerate(ls)], 1), (7, E, I), False),
    "unbind": (lambda x, w, b: sum(x @ v for v in w.unbind(0)), lambda x, ls: sum(f(x) for f in ls), (7, I), False),
    "broadcast": (lambda x, w, b: x @ w, lambda x, ls: torch.stack([f(x[:, e]) for e, f in enumerate(ls)], 1),
                  (2, E, 7, I), False),
}  # fmt: skip


@pytest.mark.parametrize("door", [*DOORS, "drop-in"])
@pytest.mark.parametrize("name", BATCHED)
def test_members_train_as_layers_of_their_own(name, door):
    together, apart, shape, bias = BATCHED[name]
    torch.manual_seed(0)
    stacked = Stacked(together, bias).double()
    layers = Apart(stacked, apart)
    batches = [torch.randn(shape).double() + 0.3 for _ in range(4)]
    state, coverage = train(door, stacked, batches)
    expected, _ = train(door, layers, batches)
    assert coverage.share() == (1.0, 1.0)
    assert coverage["weight"].factors == {"L": (E, O, O), "R": (E, I, I)}
    for e, layer in enumerate(layers.layers):
        torch.testing.assert_close(stacked.weight[e], layer.weight.T, **CLOSE)
        for key in {key.rpartition(".")[2] for key in state if key != "step"}:
            torch.testing.assert_close(state[f"weight.{key}"][e], expected[f"layers.{e}.weight.{key}"], **CLOSE)
        if bias:
            torch.testing.assert_close(stacked.bias[e], layer.bias, **CLOSE)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_a_convolution_train_as_convolutions_of_their_own(groups, door):
    class Groups(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4 // groups, 8 // groups, 3, padding=1) for _ in range(groups))
            for part, weight, bias in zip(self.convs, conv.weight.chunk(groups), conv.bias.chunk(groups)):
                part.weight.data, part.bias.data = weight.detach().clone(), bias.detach().clone()

        def forward(self, x):
            return torch.cat([conv(part) for conv, part in zip(self.convs, x.chunk(groups, 1))], 1)

    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups).double()
    apart = Groups(conv)
    batches = [torch.randn(2, 4, 5, 6).double() + 0.3 for _ in range(3)]
    state, coverage = train(door, conv, batches)
    expected, _ = train(door, apart, batches)
    inputs, outputs = 9 * 4 // groups, 8 // groups
    assert coverage["weight"].factors == {"L": (groups, outputs, outputs), "R": (groups, inputs, inputs)}
    for e, part in enumerate(apart.convs):
        for side in "LR":
            torch.testing.assert_close(state[f"weight.{side}"][e], expected[f"convs.{e}.weight.{side}"], **CLOSE)
        torch.testing.assert_close(conv.weight.chunk(groups)[e], part.weight, **CLOSE)
        torch.testing.assert_close(conv.bias.chunk(groups)[e], part.bias, **CLOSE)


ROUTES = [0, 2, 2, 0, 2, 0, 0]  # the second expert sees no token


def dense(x, w, b):
    """Every expert computes every token, a gate picks."""
    gate = F.one_hot(torch.tensor(ROUTES), E).to(x)
    return torch.einsum("neo,ne->no", torch.einsum("ni,eio->neo", x, w), gate)


def padded(x, w, b):
    """Tokens are dispatched into slots by a product with one-hots, experts multiply the slots, tokens are combined."""
    slots = torch.zeros(len(ROUTES), E, len(ROUTES)).to(x)
    for n, e in enumerate(ROUTES):
        slots[n, e, n] = 1
    return torch.einsum("nec,eco->no", slots, torch.bmm(torch.einsum("nec,ni->eci", slots, x), w))


def gathered(x, w, b):
    return torch.bmm(x[:, None], w[torch.tensor(ROUTES)])[:, 0]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("routing", [padded, gathered])
def test_experts_see_their_own_tokens_and_keep_their_factors_without_any(routing, door):
    torch.manual_seed(0)
    stacked = Stacked(routing, bias=False).double()

    def apart(x, layers):
        own = [layers[e](x[[n for n, at in enumerate(ROUTES) if at == e]]) for e in (0, 2)]
        return torch.stack([own[at // 2][ROUTES[:n].count(at)] for n, at in enumerate(ROUTES)])

    layers = Apart(stacked, apart)
    layers.layers[1].requires_grad_(False)
    batches = [torch.randn(len(ROUTES), I).double() + 0.3 for _ in range(3)]
    before = stacked.weight.detach().clone()
    state, coverage = train(door, stacked, batches)
    expected, _ = train(door, layers, batches)
    assert coverage["weight"].declined is None
    for e in (0, 2):
        for side in "LR":
            torch.testing.assert_close(state[f"weight.{side}"][e], expected[f"layers.{e}.weight.{side}"], **CLOSE)
        torch.testing.assert_close(stacked.weight[e], layers.layers[e].weight.T, **CLOSE)
    for side, size in (("L", O), ("R", I)):
        assert torch.equal(state[f"weight.{side}"][1], torch.eye(size).double())
    assert torch.equal(stacked.weight[1], before[1])


def test_dense_experts_count_the_tokens_that_a_gate_lets_through():
    """As one product ``[E * O, I]``: every expert's weight has the same inputs, so they are one matrix."""
    torch.manual_seed(0)
    coverage = mkor_fx.explain(Stacked(dense, bias=False), torch.randn(7, I), rule=mkor_fx.MKOR.published())
    assert coverage["weight"].factors == {"L": (E * O, E * O), "R": (I, I)}


@pytest.mark.parametrize("door", DOORS)
def test_cross_attention_is_a_packed_weight_in_pieces(door):
    """Queries see one input, keys and values another: factors are those of the rows of both, zero where one has no part."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            keys = x[:, 3:].tanh()
            return self.attention(x[:, :3], keys, keys)[0]

    torch.manual_seed(0)
    model = Cross().double()
    raw = copy.deepcopy(model)
    x = torch.randn(2, 7, 6).double() + 0.3
    state, coverage = train(door, model, [x])
    assert coverage.share() == (1.0, 1.0)
    assert coverage["attention.in_proj_bias"].bias_of == "attention.in_proj_weight"
    (raw(x) - 0.1).pow(2).mean().backward()
    rows = torch.cat([x[:, :3].reshape(-1, 6), x[:, 3:].tanh().reshape(-1, 6)])
    a_I, g_O = rows.mean(0), raw.attention.in_proj_bias.grad
    for side, v in (("L", g_O), ("R", a_I)):
        v = v * (RULE.kappa**0.5 / v.norm())
        expected = torch.linalg.inv(torch.eye(len(v)).double() + torch.outer(v, v))
        torch.testing.assert_close(state[f"attention.in_proj_weight.{side}"], expected.detach(), **CLOSE)


@pytest.mark.parametrize("door", DOORS)
def test_stacked_layers_used_one_after_the_other(door):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, I, I) / I**0.5)

        def forward(self, x):
            for weight in self.weight:
                x = torch.tanh(x @ weight)
            return x

    class Layers(nn.Module):
        def __init__(self, chain):
            super().__init__()
            self.weights = nn.ParameterList(chain.weight.detach().clone().unbind(0))

        def forward(self, x):
            for weight in self.weights:
                x = torch.tanh(x @ weight)
            return x

    torch.manual_seed(0)
    chain = Chain().double()
    layers = Layers(chain)
    batches = [torch.randn(6, I).double() + 0.3 for _ in range(3)]
    state, _ = train(door, chain, batches)
    expected, _ = train(door, layers, batches)
    for e in range(3):
        torch.testing.assert_close(chain.weight[e], layers.weights[e], **CLOSE)
        torch.testing.assert_close(state["weight.L"][e], expected[f"weights.{e}.L"], **CLOSE)


class AcrossABreak(nn.Module):
    """One weight on both sides of a graph break: ``[N, I] -> [N, I]``."""

    def __init__(self, first):
        super().__init__()
        self.weight, self.first, self.broken = nn.Parameter(torch.randn(I, I) / I**0.5), first, True

    def forward(self, x):
        x = torch.tanh(self.first(x, self.weight))
        if self.broken:
            torch._dynamo.graph_break()
        return F.linear(x, self.weight)


def test_a_weight_used_in_two_graphs_has_the_statistics_of_both():
    torch.manual_seed(0)
    two = AcrossABreak(F.linear).double()
    one = copy.deepcopy(two)
    one.broken = False
    batches = [torch.randn(6, I).double() + 0.3 for _ in range(3)]
    (state, coverage), (expected, _) = (train("drop-in", model, batches) for model in (two, one))
    assert coverage.share() == (1.0, 1.0)
    torch.testing.assert_close(state, expected, **CLOSE)
    torch.testing.assert_close(two.weight, one.weight, **CLOSE)


def test_a_weight_that_two_graphs_see_as_different_matrices_is_declined_and_keeps_its_gradient():
    torch.manual_seed(0)
    model = AcrossABreak(lambda x, w: F.embedding(x[:, 0].long().abs() % I, w)).double()
    plain = copy.deepcopy(model)
    batches = [torch.randn(6, I).double() * 3 for _ in range(3)]
    _, coverage = train("drop-in", model, batches)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        (plain(x) - 0.1).pow(2).mean().backward()
        optimizer.step()
    assert "two graphs" in coverage["weight"].declined.reason
    torch.testing.assert_close(model.weight, plain.weight, **CLOSE)
