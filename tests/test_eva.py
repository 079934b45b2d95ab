"""Eva against its equations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, Eva
from mkor_fx.rules import Gradient


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_inverse_of_a_damped_rank_one_matrix(bias):
    torch.manual_seed(0)
    rule, G, a, g = Eva(), torch.randn(4, 6).double(), torch.randn(6).double(), torch.randn(4).double()
    b = torch.randn(4).double() if bias else None
    made = rule.precondition({"a": a, "g": g}, Gradient(G, b))
    whole = torch.cat([G, b[:, None]], 1) if bias else G
    v = torch.outer(g, torch.cat([a, torch.ones(1).double()]) if bias else a).flatten()
    expected = torch.linalg.solve(torch.outer(v, v) + 0.03 * torch.eye(len(v)).double(), whole.flatten()).view_as(whole)
    found = torch.cat([made.weight, made.bias[:, None]], 1) if bias else made.weight
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_at_right_angles_is_only_scaled():
    a, g = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    G = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # g^T G a = 0
    assert torch.equal(Eva(damping=0.5).precondition({"a": a, "g": g}, Gradient(G)).weight, 2 * G)


@pytest.mark.parametrize("rule", [Eva(), KFAC(inverse="eigen")], ids=["eva", "eigen"])
def test_lengths_that_overflow_float16_do_not(rule):
    torch.manual_seed(0)
    G, eye = torch.randn(4, 6).half(), torch.eye
    state = {"a": 300 * torch.ones(6), "g": torch.ones(4), "L_basis": eye(4), "R_basis": eye(6), "derived": torch.ones(()),
             "L_values": torch.ones(4), "R_values": 1e5 * torch.ones(6)}  # fmt: skip
    found = rule.precondition(state, Gradient(G, G[:, 0])).weight
    assert found.dtype == torch.float16 and torch.isfinite(found).all() and found.any()


@pytest.mark.parametrize("outputs", ["mean", "sum"])
def test_equations(outputs):
    """Beside a loop written out here: published averages, the first taken as it is, sized with the bias."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    twin = copy.deepcopy(model)
    rule = Eva(outputs=outputs, damping=1e-3)
    step = mkor_fx.compile_step(model, mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), rule, backend="eager")
    means = None
    for _ in range(6):
        x, y = torch.randn(16, 5).double(), torch.randn(16, 3).double()
        step(x, y)
        out = twin(x)
        G, b, g_NO = torch.autograd.grad(mse_loss(out, y), [twin.weight, twin.bias, out])
        new = torch.cat([x.mean(0), torch.ones(1).double()]), g_NO.mean(0) if outputs == "mean" else g_NO.sum(0)
        means = new if means is None else [0.05 * old + 0.95 * fresh for old, fresh in zip(means, new, strict=True)]
        a, g = means
        joint = torch.cat([G, b[:, None]], 1)
        D = (joint - (g @ joint @ a) / (1e-3 + a.dot(a) * g.dot(g)) * torch.outer(g, a)) / 1e-3
        D *= joint.norm() / D.norm()
        with torch.no_grad():
            twin.weight -= 0.1 * D[:, :-1]
            twin.bias -= 0.1 * D[:, -1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # averages are float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.0}, r"Eva\(damping=0\.0\): must be positive"),
        ({"decay": 1.0}, r"Eva\(decay=1\.0\): the weight of the old average"),
        ({"outputs": "rows"}, r"Eva\(outputs='rows'\): must be 'mean' or 'sum'"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Eva(**options)
