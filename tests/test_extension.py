"""A toy op row and a toy rule, defined here, work in every door: neither touches a library file."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mkor_fx
from mkor_fx import MKOR, Rule
from mkor_fx.ir import Decline, Operand, Tap, fake_value
from mkor_fx.ops import TABLE, op_rule
from mkor_fx.passes.torch_api.capture import decompositions
from mkor_fx.rules import Gradient

aten = torch.ops.aten
STEPS, LR = 4, 0.05


# ---- a toy rule: Eva, D = (G - (g^T G a) / (damping + |a|^2 |g|^2) g a^T) / damping ---------------------------------


@dataclass(frozen=True, kw_only=True)
class Eva(Rule):
    decay: float = 0.9
    damping: float = 0.5

    def init(self, shape, device):
        return {"a": torch.zeros(shape.I, device=device), "g": torch.zeros(shape.O, device=device)}

    def summarize(self, shape, a_NI, g_NO):
        return a_NI.sum(0), g_NO.sum(0)

    def update(self, state, uses, grad, step):
        ((a_sum, g_O), rows, _), = uses
        average = lambda old, new: self.decay * old + (1 - self.decay) * new
        return {"a": average(state["a"], a_sum / rows), "g": average(state["g"], g_O)}

    def precondition(self, state, grad):
        a_I, g_O = state["a"], state["g"]
        along = g_O @ grad.weight @ a_I / (self.damping + a_I.dot(a_I) * g_O.dot(g_O))
        return Gradient((grad.weight - along * torch.outer(g_O, a_I)) / self.damping, grad.bias)


def eva_by_hand(batches, weight_OI, rule):
    """The same on one linear layer under the loss ``mean((x W^T - y)^2)``, from the equations."""
    W = weight_OI.clone()
    g, a = (torch.zeros(size) for size in W.shape)
    for x, y in batches:
        errors_NO = 2 * (x @ W.T - y) / y.numel()
        a = rule.decay * a + (1 - rule.decay) * x.mean(0)
        g = rule.decay * g + (1 - rule.decay) * errors_NO.sum(0)
        G = errors_NO.T @ x
        D = (G - (g @ G @ a) / (rule.damping + (a @ a) * (g @ g)) * torch.outer(g, a)) / rule.damping
        W -= LR * D
    return W, a, g


def train(door, model, batches, rule):
    """Train; returns the factors and the coverage."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if door == "compile_step":
        step = mkor_fx.compile_step(model, nn.functional.mse_loss, optimizer, rule, backend="eager")
        for x, y in batches:
            step(x, y)
        return step.mkor.state_dict(), step.coverage
    handle = mkor_fx.compile(model, rule, backend="eager")
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(handle(x), y).backward()
        optimizer.step()
    return handle.mkor.state_dict(), handle.coverage


@pytest.mark.parametrize("door", ["compile_step", "compile"])
def test_toy_rule(door):
    torch.manual_seed(0)
    model, rule = nn.Linear(5, 3, bias=False), Eva()
    batches = [(torch.randn(8, 5) + 1, torch.randn(8, 3)) for _ in range(STEPS)]
    W, a, g = eva_by_hand(batches, model.weight.detach(), rule)
    state, coverage = train(door, model, batches, rule)
    torch.testing.assert_close(model.weight.detach(), W)
    torch.testing.assert_close(state, {"weight.a": a, "weight.g": g, "step": torch.tensor(STEPS)})
    assert coverage["weight"].factors == {"a": (5,), "g": (3,)}
    assert coverage["weight"].sent == 5 + 3 + 1


def test_toy_rule_inside_the_backward_uses_the_factors_from_before_the_step():
    torch.manual_seed(0)
    model, rule = nn.Linear(5, 3, bias=False), Eva()
    batches = [(torch.randn(8, 5) + 1, torch.randn(8, 3)) for _ in range(2)]
    handle, found = mkor_fx.compile(model, rule, backend="eager", precondition="backward"), []
    for x, y in batches:
        (raw,) = torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.weight)
        handle.zero_grad()
        nn.functional.mse_loss(handle(x), y).backward()
        found.append((model.weight.grad, raw))
    (fresh, raw), (second, second_raw) = found
    torch.testing.assert_close(fresh, raw / rule.damping)
    _, a, g = eva_by_hand(batches[:1], model.weight.detach(), rule)
    expected = rule.precondition({"a": a, "g": g}, Gradient(second_raw, None)).weight
    torch.testing.assert_close(second, expected)


def test_a_rule_that_cannot_unscale_says_what_to_define():
    with pytest.raises(NotImplementedError, match=r"Eva.*unscale"):
        Eva().unscale((torch.ones(2),), torch.ones(()))


# ---- a toy row: a product of stacks, as one expert makes it ---------------------------------------------------------


def first_transposed(x_1IN):
    return x_1IN[0].t()


def first(g_1NO):
    return g_1NO[0]


class Expert(nn.Module):
    """[N, I] -> [N, O] by a stack of one matrix."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(1, inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.bmm(x[None], self.stack)[0]


@pytest.fixture
def without_row():
    """The table as if it had never had a row for products of stacks."""
    before = TABLE.pop(str(aten.bmm.default), None)
    yield
    TABLE.pop(str(aten.bmm.default), None)
    if before is not None:
        TABLE[str(aten.bmm.default)] = before


@pytest.fixture
def toy_row(without_row):
    @op_rule(aten.bmm.default, examples=(lambda: (Expert(3, 5), (torch.randn(7, 3),)),))
    def expert(node):
        x_1IN, g_1NO = node.args
        stack, inputs, _ = fake_value(x_1IN).shape
        if stack != 1:
            return Decline(f"{stack} experts")
        matrix = (inputs, fake_value(g_1NO).shape[2])
        return Tap(node, "expert", matrix, Operand(x_1IN, first_transposed), Operand(g_1NO, first))


def test_without_a_row_the_op_is_declined(without_row):
    decline = mkor_fx.explain(Expert(5, 3), torch.randn(8, 5))["stack"].declined
    assert decline is not None and "bmm" in decline.op


@pytest.mark.parametrize("rule", [MKOR.published(), Eva()], ids=["mkor", "eva"])
@pytest.mark.parametrize("door", ["compile_step", "compile"])
def test_toy_row(toy_row, door, rule):
    """The expert trains exactly as a linear layer with the same weight does."""
    torch.manual_seed(0)
    expert, linear = Expert(5, 3), nn.Linear(5, 3, bias=False)
    linear.weight.data.copy_(expert.stack.detach()[0].T)
    batches = [(torch.randn(8, 5) + 1, torch.randn(8, 3)) for _ in range(STEPS)]
    state, coverage = train(door, expert, batches, rule)
    expected, _ = train(door, linear, batches, rule)
    assert coverage["stack"].op == "expert" and coverage["stack"].declined is None
    torch.testing.assert_close(expert.stack.detach()[0].T, linear.weight.detach())
    torch.testing.assert_close({k.removeprefix("stack."): v for k, v in state.items()},
                               {k.removeprefix("weight."): v for k, v in expected.items()})


def test_a_row_keeps_its_op_from_being_decomposed_whenever_it_is_added():
    op = aten.native_layer_norm_backward.default
    assert op in decompositions() and str(op) not in TABLE
    try:
        op_rule(op)(lambda node: None)
        assert op not in decompositions()
    finally:
        del TABLE[str(op)]
