"""Every row of the op table, held to one identity: rows_P.T @ rows_Q is the gradient, `a` the layer's input."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from joint import capture, rows
from torch import nn

import mkor_fx
from mkor_fx import reasons
from mkor_fx.ir import INPUTS_FIRST, INPUTS_LAST
from mkor_fx.ops import TABLE
from mkor_fx.ops.document import document
from mkor_fx.ops.table import Weight
from mkor_fx.passes.match.boxes import view_of
from mkor_fx.passes.match.find_sites import downstream, read_weight
from mkor_fx.passes.match.pieces import on_whole

ROOT = Path(__file__).parents[1]


def patches(layer, x):
    """[N, I], or [E, N, I] by groups, with one patch after the other."""
    spatial = x.dim() - 2
    padding = [(d * (k - 1)) for d, k in zip(layer.dilation, layer.kernel_size)]
    if layer.padding != "same":
        padding = [2 * p for p in layer.padding]
    x = F.pad(x, [n for p in reversed(padding) for n in (p // 2, p - p // 2)])
    geometry = zip(x.shape[2:], layer.dilation, layer.kernel_size, layer.stride)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in geometry]
    found = []
    for image in x:
        for at in torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, spatial):
            corner = [slice(i * s, i * s + d * (k - 1) + 1, d)
                      for i, s, d, k in zip(at.tolist(), layer.stride, layer.dilation, layer.kernel_size)]
            found.append(image[(slice(None), *corner)])
    return by_group(torch.stack(found).flatten(1), layer.groups)


def by_group(rows_NM, groups):
    return rows_NM if groups == 1 else torch.stack(rows_NM.chunk(groups, 1))


#: what the rows ``a`` of each layer are, by the name of the tap's operation
INPUTS = {
    "linear": lambda layer, x: x.flatten(0, -2),
    "conv": patches,
    "conv_transpose": lambda layer, x: by_group(x.movedim(1, -1).flatten(0, -2), layer.groups),
    "embedding": lambda layer, x: F.one_hot(x.flatten(), len(layer.weight)).double() * _kept(layer, x),
    "bilinear": lambda layer, x, y: torch.stack([torch.outer(*pair).flatten() for pair in zip(x, y)]),
}


def _kept(layer, x):
    padding = getattr(layer, "padding_idx", None)
    return (x.flatten() != (-1 if padding is None else padding)).double()[:, None]


class Stored(nn.Module):
    """A weight of any layout without a layer around it."""

    def __init__(self, shape, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.weight)


def stored(shape, function, *inputs, name=None):
    return pytest.param(lambda: (Stored(shape, function), inputs), id=name)


EXAMPLES = [
    *(pytest.param(make, id=f"{row.name}-{i}") for row in TABLE.values() for i, make in enumerate(row.examples)),
    stored((3, 5), lambda x, w: x @ w, torch.randn(7, 3), name="in-out"),
    stored((3, 5), lambda x, w: x @ w, torch.randn(2, 4, 3), name="in-out-3d"),
    stored((5, 3), lambda x, w: x @ w.T, torch.randn(7, 3), name="out-in"),
    stored((5, 3), lambda x, w: (w @ x.mT).mT, torch.randn(7, 3), name="left"),
    stored((4, 4), lambda x, w: x @ w, torch.randn(4, 4), name="in-out-square"),
    stored((4, 4), F.linear, torch.randn(4, 4), name="out-in-square"),
    stored((5, 3, 1), lambda x, w: x @ w.view(5, 3).T, torch.ones(7, 3), name="3d"),
    stored((2, 5, 3), lambda x, w: x @ w.permute(2, 0, 1).reshape(3, 10), torch.randn(7, 3), name="permuted"),
    stored((2, 6, 3), lambda x, w: torch.einsum("bsd,hdk->bhsk", x, w), torch.randn(2, 5, 6), name="heads"),
    stored((2, 6, 3), lambda x, w: torch.einsum("bhsk,hdk->bsd", x, w), torch.randn(2, 2, 5, 3), name="heads-out"),
    stored((3, 6, 4), lambda x, w: torch.baddbmm(torch.ones(3, 1, 4).to(x), x, w), torch.randn(3, 5, 6), name="baddbmm"),
    stored((3, 6, 4), lambda x, w: sum(x @ v for v in w.unbind(0)), torch.randn(5, 6), name="unbind"),
    stored((3, 6, 6), lambda x, w: (x @ w[0]).tanh() @ w[2], torch.randn(5, 6), name="select"),
    stored((8, 6), lambda x, w: F.linear(x, w[:4]) * F.linear(x.tanh(), w[4:]), torch.randn(5, 6), name="halves"),
    stored((9, 6), lambda x, w: F.linear(x, w[2:5]), torch.randn(5, 6), name="slice"),
    stored((9, 6), lambda x, w: F.linear(x[:, :2], w[:, 1:3]), torch.randn(5, 6), name="columns"),
    stored((12, 1), lambda x, w: F.linear(x, w[:4]), torch.randn(5, 1), name="slice-of-a-column"),
    stored((3, 1), lambda x, w: x @ w[:1] + F.linear(x, w[1:]).sum(), torch.randn(5, 1), name="row-and-rows"),
    stored((3, 2), lambda x, w: sum(F.linear(x, v) for v in w.chunk(3)), torch.randn(5, 2), name="chunks-of-one"),
    stored((3, 4), lambda x, w: sum(F.linear(x, w[i : i + 1]) for i in (1, 2, 0)), torch.randn(5, 4), name="rows"),
    stored((6, 5), lambda x, w: x @ w.expand(3, 6, 5), torch.randn(3, 7, 6), name="expanded"),
    stored((12, 5), lambda x, w: torch.bmm(x, w.view(3, 4, 5)), torch.randn(3, 7, 4), name="batch-in-2d"),
    pytest.param(lambda: (nn.Conv2d(2, 2, 2, stride=2), (torch.randn(1, 2, 4, 4),)), id="conv-square"),
    pytest.param(lambda: (nn.Conv1d(3, 4, 4, padding="same"), (torch.randn(2, 3, 9),)), id="conv-same-even"),
]


def read(joint):
    """The weight of a graph, its view, and its taps on the whole of it; whether or not these make it a site."""
    step = joint.step
    parameter = next(p for p in step.parameters.values() if len(p.shape) >= 2)
    uses = read_weight(parameter, downstream(step.seeds))
    assert isinstance(uses, list), uses
    return parameter, view_of(*uses[0].whole), [on_whole(use) for use in uses]


def widened(values):
    return [v.double() if v.dtype == torch.float32 else v for v in values]


@pytest.mark.parametrize("make", EXAMPLES)
def test_row_reads_the_gradient_off_its_operands(make):
    torch.manual_seed(0)
    layer, inputs = make()
    half = inputs[0].dtype == torch.bfloat16
    layer, inputs = layer.bfloat16() if half else layer.double(), widened(inputs)
    outputs = layer(*inputs)
    g = torch.randn_like(outputs)
    expected = torch.autograd.grad(outputs, list(layer.parameters()), g)

    (joint,) = capture(layer, *inputs)
    (seed,) = joint.step.seeds
    joint.values[joint.step.graph.find_nodes(op="placeholder").index(seed)] = g
    parameter, view, taps = read(joint)
    env, total = joint.run(), 0
    for tap in taps:
        rows_NP, rows_NQ = rows(env, tap.rows_first), rows(env, tap.rows_last)
        assert tap.matrix == (*rows_NP.shape[:-2], rows_NP.shape[-1], rows_NQ.shape[-1]) == view.matrix
        total = total + rows_NP.mT @ rows_NQ
        count = rows_NP.shape[-2] if tap.count is None else rows(env, tap.count)
        live = (rows_NP != 0).any(-1) & (rows_NQ != 0).any(-1)
        if tap.op == "embedding" or (tap.batched and len(taps) == 1 and "conv" not in tap.op):
            torch.testing.assert_close(count, live.sum(-1).to(count.dtype) if isinstance(count, torch.Tensor) else len(live))
        for node in tap.bias_grads:
            torch.testing.assert_close(env[node].flatten(), expected[1].flatten(), rtol=1e-12, atol=1e-12)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(view.store(total, parameter.shape), expected[0], **tolerance)
    if isinstance(layer, (Stored, Weight)) or len(taps) > 1:
        return

    (tap,) = taps
    a_NI, g_NO = rows(env, tap.a), rows(env, tap.g)
    torch.testing.assert_close(a_NI, INPUTS[tap.op.rstrip("123d")](layer, *inputs), rtol=0, atol=0)
    if "conv_transpose" in tap.op:  # every output's gradient is in the patches that its input has touched
        assert g_NO.shape[-1] == torch.Size(layer.weight.shape[1:]).numel()
        return
    g_rows = (g.movedim(1, -1) if "conv" in tap.op else g).flatten(0, -2)
    g_rows = g_rows * _kept(layer, *inputs) if tap.op == "embedding" else by_group(g_rows, getattr(layer, "groups", 1))
    torch.testing.assert_close(g_NO, g_rows, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function, inputs",
    [(lambda x, w: x @ w, INPUTS_FIRST), (F.linear, INPUTS_LAST), (lambda x, w: (w @ x.mT).mT, INPUTS_LAST)],
)
@pytest.mark.parametrize("size", [3, 4])
def test_orientation_follows_from_the_use_even_where_all_sizes_are_equal(function, inputs, size):
    shape = (4, size) if inputs == INPUTS_LAST else (size, 4)
    (joint,) = capture(Stored(shape, function), torch.randn(4, size))
    ((tap,)) = read(joint)[2]
    assert tap.inputs == inputs


def test_every_row_has_an_example():
    silent = {row.name for row in TABLE.values() if not row.examples}
    assert silent == {"grouped_linear_of_transformers"}, "that one needs transformers: the families' tests hold it"


@pytest.mark.parametrize("make, dim", [
    (lambda: Stored((6, 5), lambda x, w: F.linear(x, w[1:])), 0),
    (lambda: Stored((3, 5, 4), lambda x, w: x @ w[0] + x.tanh() @ w[2]), 0),
    (lambda: Stored((2, 5, 4), lambda x, w: x.unsqueeze(1).unsqueeze(1).expand(-1, 2, 3, 5) @ w), 0),
    (lambda: nn.Conv1d(5, 4, 3, padding=1, stride=2, padding_mode="circular"), 2),
    (lambda: nn.ConvTranspose1d(5, 4, 3, stride=2), 2),
])  # fmt: skip
@pytest.mark.parametrize("door", ["step", "drop-in"])
def test_sizes_may_be_dynamic(make, dim, door):
    torch.manual_seed(0)
    model = make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = lambda out, y: (out * y).pow(2).mean()
    step = mkor_fx.compile_step(model, loss_fn, optimizer, backend="eager", dynamic=True) if door == "step" else None
    handle = mkor_fx.compile(model, backend="eager", dynamic=True) if door == "drop-in" else None
    for size in (5, 7, 6):
        x = torch.randn(size, 5).double() if dim == 0 else torch.randn(2, 5, size).double()
        if step is not None:
            step(x, 1.0)
        else:
            optimizer.zero_grad()
            loss_fn(handle(x), 1.0).backward()
            optimizer.step()
    state = (step or handle).mkor
    assert state.step == 3 and (step or handle).coverage["weight"].declined is None


def test_the_page_of_ops_is_the_table():
    assert (ROOT / "docs/ops.md").read_text() == document(), "write it again: python -m mkor_fx.ops.document > docs/ops.md"


def test_every_reason_on_the_page_is_given_somewhere():
    code = "".join(path.read_text() for folder in ("mkor_fx", "passes") for path in (ROOT / folder).glob("**/*.py"))
    for name in (name for name, value in vars(reasons).items() if isinstance(value, str) and value in reasons.REASONS):
        assert code.count(name) >= 2, f"{name} is defined and never given"


def test_a_program_with_ordered_side_effects_is_refused_by_name():
    layer = Stored((4, 4), lambda x, w: F.linear(x, torch.linalg.solve(torch.eye(4) * 2, w)))
    step = mkor_fx.compile_step(layer, F.mse_loss, torch.optim.SGD(layer.parameters(), lr=0.1), backend="eager")
    with pytest.raises(ValueError, match=r"side effects.*mkor_fx\.compile"):
        step(torch.randn(3, 4), torch.randn(3, 4))


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
