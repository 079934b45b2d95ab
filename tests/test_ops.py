"""Every row of the op table, held to one identity: rows_P.T @ rows_Q is the gradient, `a` the layer's input."""

import pytest
import torch
import torch.nn.functional as F
from joint import capture, rows
from torch import nn

from mkor_fx.ir import INPUTS_FIRST, INPUTS_LAST, Tap
from mkor_fx.ops import TABLE
from mkor_fx.passes.match import assign_roles, downstream, read_summand, summands

#: what the rows ``a`` of each layer are, by the name of the op table's row
INPUTS = {
    "linear": lambda layer, x: x.flatten(0, -2),
    "conv2d": lambda c, x: F.unfold(x, c.kernel_size, c.dilation, c.padding, c.stride).mT.flatten(0, 1),
    "embedding": lambda layer, x: F.one_hot(x.flatten(), layer.num_embeddings).double() * _kept(layer, x),
}


def _kept(layer, x):
    return (x.flatten() != (-1 if layer.padding_idx is None else layer.padding_idx)).double()[:, None]


class Stored(nn.Module):
    """A weight of any layout without a layer around it."""

    def __init__(self, shape, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.weight)


EXAMPLES = [
    *(pytest.param(row.name, make) for row in TABLE.values() for make in row.examples),
    pytest.param("linear", lambda: (Stored((3, 5), lambda x, w: x @ w), (torch.randn(7, 3),)), id="in-out"),
    pytest.param("linear", lambda: (Stored((3, 5), lambda x, w: x @ w), (torch.randn(2, 4, 3),)), id="in-out-3d"),
    pytest.param("linear", lambda: (Stored((5, 3), lambda x, w: x @ w.T), (torch.randn(7, 3),)), id="out-in"),
    pytest.param("linear", lambda: (Stored((5, 3), lambda x, w: (w @ x.mT).mT), (torch.randn(7, 3),)), id="left"),
    pytest.param("linear", lambda: (Stored((4, 4), lambda x, w: x @ w), (torch.randn(4, 4),)), id="in-out-square"),
    pytest.param("linear", lambda: (Stored((4, 4), F.linear), (torch.randn(4, 4),)), id="out-in-square"),
    pytest.param("linear", lambda: (Stored((5, 3, 1), lambda x, w: x @ w.view(5, 3).T), (torch.ones(7, 3),)), id="3d"),
    pytest.param("embedding", lambda: (nn.Embedding(6, 3), (torch.randint(0, 6, (4, 5)),)), id="no-padding"),
    pytest.param("conv2d", lambda: (nn.Conv2d(2, 2, 2, stride=2), (torch.randn(1, 2, 4, 4),)), id="conv-square"),
]


def read(step):
    """The only weight of a graph and its tap, whether or not that use makes it a site."""
    (parameter,) = (p for p in step.parameters.values() if len(p.shape) >= 2)
    (summand,) = summands(parameter.grad)
    tap = assign_roles(read_summand(summand, parameter.shape), downstream(step.seeds))
    assert isinstance(tap, Tap), tap
    return parameter, tap


@pytest.mark.parametrize("name, make", EXAMPLES)
def test_row_reads_the_gradient_off_its_operands(name, make):
    torch.manual_seed(0)
    layer, (x,) = make()
    layer, x = layer.double(), x.double() if x.is_floating_point() else x
    outputs = layer(x)
    g = torch.randn_like(outputs)
    expected = torch.autograd.grad(outputs, list(layer.parameters()), g)

    (joint,) = capture(layer, x)
    (seed,) = joint.step.seeds
    joint.values[joint.step.graph.find_nodes(op="placeholder").index(seed)] = g
    parameter, tap = read(joint.step)
    env = joint.run()
    rows_NP, rows_NQ = rows(env, tap.rows_first), rows(env, tap.rows_last)
    assert tap.op == name
    assert tap.matrix == (rows_NP.shape[1], rows_NQ.shape[1])
    torch.testing.assert_close((rows_NP.T @ rows_NQ).reshape(parameter.shape), expected[0], rtol=1e-12, atol=1e-12)

    a_NI, g_NO = rows(env, tap.a), rows(env, tap.g)
    g_rows = (g.movedim(1, -1) if name.startswith("conv") else g).flatten(0, -2)
    g_rows = g_rows * _kept(layer, x) if name == "embedding" else g_rows
    torch.testing.assert_close(a_NI, INPUTS[name](layer, x), rtol=0, atol=0)
    torch.testing.assert_close(g_NO, g_rows, rtol=0, atol=0)
    for node in tap.bias_grads:
        torch.testing.assert_close(env[node], expected[1], rtol=1e-12, atol=1e-12)
    count = len(a_NI) if tap.count is None else int(rows(env, tap.count))
    assert count == (_kept(layer, x).sum() if name == "embedding" else len(a_NI))


@pytest.mark.parametrize(
    "function, inputs",
    [(lambda x, w: x @ w, INPUTS_FIRST), (F.linear, INPUTS_LAST), (lambda x, w: (w @ x.mT).mT, INPUTS_LAST)],
)
@pytest.mark.parametrize("size", [3, 4])
def test_orientation_follows_from_the_use_even_where_all_sizes_are_equal(function, inputs, size):
    shape = (4, size) if inputs == INPUTS_LAST else (size, 4)
    (joint,) = capture(Stored(shape, function), torch.randn(4, size))
    assert read(joint.step)[1].inputs == inputs


def test_every_row_has_an_example():
    assert all(row.examples for row in TABLE.values())
    assert {row.name for row in TABLE.values()} <= set(INPUTS)


def test_embedding_by_frequency_is_declined():
    (joint,) = capture(nn.Embedding(6, 3, scale_grad_by_freq=True), torch.randint(0, 6, (4, 5)))
    assert "scale_grad_by_freq" in joint.step.declines[0].reason


def test_tied_weight_has_two_taps_whose_products_add_up_to_its_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.token.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.token(ids))).pow(2).sum()

    torch.manual_seed(0)
    model, ids = Tied().double(), torch.randint(0, 7, (3, 5))
    (expected,) = torch.autograd.grad(model(ids), [model.head.weight])
    (joint,) = capture(model, ids)
    env, taps = joint.run(), joint.site("token.weight").taps
    assert {tap.op: tap.inputs for tap in taps} == {"linear": INPUTS_LAST, "embedding": INPUTS_FIRST}
    total = sum(rows(env, tap.rows_first).T @ rows(env, tap.rows_last) for tap in taps)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
