"""Shampoo against its equations, written out here without the rule, and beside pytorch_optimizer's."""

import pytest
import torch
from side_by_side import batched, matrices, side_by_side, wide
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import Shampoo
from mkor_fx.rules import Gradient, Shape
from mkor_fx.rules.shampoo import inverse_root

EACH_ROOT = pytest.mark.parametrize("root", ["newton", "eigh"])
SGD = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)


def exact(root, **options):
    """A rule in float64 of which next to nothing is damping."""
    return wide(Shampoo)(root=root, damping=1e-12, newton_steps=45, graft=None, **options)


def directions(rule, gradients, lookup=False):
    """Of each gradient with its own step in the roots, by the rule's functions alone."""
    outputs, inputs = gradients[0].shape
    state, found = rule.init(Shape(outputs, inputs, lookup=lookup), torch.device("cpu")), []
    for t, G in enumerate(gradients):
        grad = Gradient(G)
        state = rule.advance(rule.update(state, [], grad, torch.tensor(t)), grad, torch.tensor(t))
        state = rule.derive(state) if rule.root == "eigh" else state
        found.append(rule.precondition(state, grad).weight)
    return found


@EACH_ROOT
def test_one_gradient_of_rank_one_becomes_a_unit_matrix(root):
    u, v = (nn.functional.normalize(torch.randn(n).double(), dim=0) for n in (4, 6))
    (D,) = directions(exact(root), [17.0 * torch.outer(u, v)])
    torch.testing.assert_close(D, torch.outer(u, v), rtol=0, atol=1e-10)


@EACH_ROOT
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("size", [(5, 5), (4, 6)])
def test_one_gradient_loses_its_singular_values(root, size, lookup):
    """With two sides of power 1/4 and with one of power 1/2."""
    G = torch.randn(size).double()
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    (D,) = directions(exact(root), [G], lookup)
    torch.testing.assert_close(D, U @ V, rtol=0, atol=1e-9)


@EACH_ROOT
def test_sums_shrink_directions_and_corrected_averages_do_not(root):
    G = torch.randn(4, 4).double()
    first, second, third = directions(exact(root), [G, G, G])
    torch.testing.assert_close(second, first / 2**0.5, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(third, first / 3**0.5, rtol=1e-9, atol=1e-10)
    for D in directions(exact(root, beta=0.7), [G, G, G]):
        torch.testing.assert_close(D, first, rtol=1e-9, atol=1e-10)


def test_an_order_of_its_own():
    G = torch.randn(4, 6).double()
    (D,) = directions(exact("newton", order=3), [G @ G.T])
    values, basis = torch.linalg.eigh(G @ G.T)
    expected = (basis * values ** (1 - 4 / 3)) @ basis.T  # of S both factors are S^2, each to the power of -1/3
    torch.testing.assert_close(D, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_newton_finds_the_root(order, scale):
    basis = torch.linalg.qr(torch.randn(12, 12).double())[0]
    values = scale * torch.logspace(-5, 0, 12).double()
    found = inverse_root((basis * values) @ basis.T, order, 40)
    expected = (basis * values ** (-1 / order)) @ basis.T
    assert (found - expected).norm() < 1e-9 * expected.norm()


def test_newton_in_float32_with_the_default_damping_is_as_good_as_eigenvectors():
    """Of a factor without full rank, whose rounding has negative eigenvalues."""
    G = (torch.randn(64, 8) * torch.logspace(-2, 1, 8)) @ torch.randn(8, 64)
    L, rule = G @ G.T, Shampoo()
    assert torch.linalg.eigvalsh(L.double())[0] < 0
    damped = L + rule.damping * L.norm() * torch.eye(64)
    found = inverse_root(damped, 4, rule.newton_steps).double()
    values, basis = torch.linalg.eigh(damped.double())
    expected = (basis * values**-0.25) @ basis.T
    assert torch.linalg.eigvalsh(found)[0] > 0
    assert (found - expected).norm() < 0.05 * expected.norm()
    short = torch.linalg.eigvalsh(inverse_root(damped, 4, 8).double())
    assert short[0] > 0 and short[-1] < 0.5 * values[0] ** -0.25  # fewer steps damp


@pytest.mark.parametrize("magnitude", ["adagrad", "rmsprop"])
def test_a_direction_in_the_size_of_another_step(magnitude):
    rule = wide(Shampoo)(root="newton", graft=None, magnitude=magnitude, beta2=0.9)
    gradients, squares = [torch.randn(4, 6).double() for _ in range(5)], torch.zeros(4, 6).double()
    for t, (G, D) in enumerate(zip(gradients, directions(rule, gradients), strict=True)):
        squares = squares + G**2 if magnitude == "adagrad" else 0.9 * squares + 0.1 * G**2
        v = squares if magnitude == "adagrad" else squares / (1 - 0.9 ** (t + 1))
        torch.testing.assert_close(D.norm(), (G / (v.sqrt() + 1e-10)).norm(), rtol=1e-12, atol=0)
    plain = directions(wide(Shampoo)(root="newton", graft=None), gradients)[-1]
    torch.testing.assert_close(D / D.norm(), plain / plain.norm(), rtol=1e-12, atol=1e-13)


class Reference:
    """Eager Shampoo by eigenvectors, in front of a base optimizer. ``L = sum G G^T`` or its corrected average."""

    def __init__(self, model, optimizer, root, beta, damping, every, sized):
        vars(self).update(locals(), t=0, sites=matrices(model), factors={}, roots={})

    @torch.no_grad()
    def step(self, state):
        self.t += 1
        for name, (weight, matrix, lookup) in self.sites.items():
            G, power = matrix(weight.grad), -1 / 2 if lookup else -1 / 4
            grams = [G @ G.T] if lookup else [G @ G.T, G.T @ G]
            w = 1 if self.beta == 1 else 1 - self.beta
            old = self.factors.get(name, [0] * 2)
            self.factors[name] = [self.beta * F + w * gram for F, gram in zip(old, grams, strict=False)]
            before = self.roots.get(name)
            if (self.t - 1) % self.every == 0:
                fix = 1 if self.beta == 1 else 1 - self.beta**self.t
                self.roots[name] = [self.power(F / fix, power) for F in self.factors[name]]
            roots = self.roots[name] if self.root == "newton" else before
            D = G if roots is None else roots[0] @ G
            D = D if roots is None or lookup else D @ roots[1]
            D = D * G.norm() / D.norm() if self.sized else D
            weight.grad.copy_(matrix(D).reshape(weight.shape) if lookup else D.reshape(weight.shape))
        self.optimizer.step()

    def power(self, F, power):
        values, basis = torch.linalg.eigh(F + self.damping * F.norm() * torch.eye(len(F)).to(F))
        return (basis * values**power) @ basis.T


@pytest.mark.parametrize(("name", "root", "beta", "every", "door"), [
    ("mlp", "newton", 1.0, 3, "compile_step"),
    ("mlp", "eigh", 0.9, 2, "compile_step"),
    ("mlp", "eigh", 0.9, 2, "compile"),
    pytest.param("mlp", "newton", 1.0, 3, "compile", marks=pytest.mark.nightly),
    *(pytest.param(name, root, beta, 2, door, marks=pytest.mark.nightly) for name in ("cnn", "gpt")
      for root, beta in (("newton", 0.9), ("eigh", 1.0)) for door in ("compile_step", "compile")),
])  # fmt: skip
def test_both_doors_follow_the_equations(name, root, beta, every, door):
    options = {"beta": beta, "damping": 1e-4, "graft": "gradient" if beta == 1 else None}
    rule = wide(Shampoo)(root=root, derive_every=every, newton_steps=20, **options)
    reference = lambda model, optimizer: Reference(model, optimizer, root, beta, 1e-4, every, beta == 1)
    refresh = {"refresh_every": every} if root == "newton" else {}
    side_by_side(batched(name, 8, 1), rule, door, SGD, reference, 1e-8, **refresh)


def trajectory(optimizer_of, rule=None, steps=20):
    """A weight behind some steps, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh()).double()
    batches = [(torch.randn(16, 6).double(), torch.randn(16, 4).double()) for _ in range(steps)]
    optimizer = optimizer_of(model.parameters())
    step = None if rule is None else mkor_fx.compile_step(model, mse_loss, optimizer, rule, backend="eager")
    for x, y in batches:
        if step is not None:
            step(x, y)
            continue
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model[0].weight.detach()


def test_it_is_the_shampoo_of_pytorch_optimizer():
    """Sums with roots at every step. Its damping is a number that is added to the first sum; here it is too small to see."""
    library = pytest.importorskip("pytorch_optimizer", reason="installed by make test")
    theirs = trajectory(lambda params: library.Shampoo(params, lr=0.05, matrix_eps=1e-13))
    ours = trajectory(lambda params: torch.optim.SGD(params, lr=0.05), exact("newton"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("options", "graft"), [({"graft": "gradient"}, 1), ({"graft": None, "magnitude": "adagrad"}, 2)])
def test_it_is_the_scalable_shampoo_of_pytorch_optimizer(options, graft):
    """Averages, in front of Nesterov momentum. That one does not correct them, which directions of a size that is given do
    not show."""
    library = pytest.importorskip("pytorch_optimizer", reason="installed by make test")
    theirs = trajectory(lambda params: library.ScalableShampoo(
        params, lr=0.05, betas=(0.9, 0.9), start_preconditioning_step=1, preconditioning_compute_steps=1,
        graft_type=graft, matrix_eps=1e-13, use_svd=True, shape_interpretation=False))  # fmt: skip
    rule = wide(Shampoo)(root="newton", damping=1e-12, newton_steps=45, beta=0.9, **options)
    ours = trajectory(lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True), rule)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_nothing_but_the_number_of_rows_crosses_the_network():
    model = nn.Linear(40, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, mse_loss, optimizer, Shampoo(max_factor=8), backend="eager")
    step(torch.randn(16, 40), torch.randn(16, 4))
    assert step.coverage["weight"].sent == 1
    assert set(step.mkor.state_dict()) == {"weight.L", "weight.L_root", "weight.count", "step"}


def test_a_weight_whose_gradient_was_zero_stays_finite_and_wakes_up():
    for root in ("newton", "eigh"):
        zero, one = torch.zeros(3, 3), torch.eye(3)
        found = directions(Shampoo(root=root, graft=None), [zero, zero, one])
        assert not found[0].any() and not found[1].any()
        torch.testing.assert_close(found[2], one, rtol=1e-4, atol=1e-4)


def test_both_sides_too_large():
    rule = Shampoo(max_factor=2)
    assert rule.init(Shape(3, 4), torch.device("cpu")) == {}
    assert rule.without_state(Shape(3, 4)) == "both sides exceed max_factor=2"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"root": "lu"}, r"Shampoo\(root='lu'\): must be one of 'eigh', 'newton'"),
        ({"beta": 1.5}, r"Shampoo\(beta=1\.5\): the weight of the old average must be a number in \[0, 1\]"),
        ({"beta2": 1.0}, r"Shampoo\(beta2=1\.0\): the weight of the old average must be a number in \[0, 1\)"),
        ({"damping": 0.0}, r"Shampoo\(damping=0\.0\): must be positive"),
        ({"eps": -1.0}, r"Shampoo\(eps=-1\.0\): must be positive"),
        ({"newton_steps": 0}, r"Shampoo\(newton_steps=0\): must be an integer of at least 1"),
        ({"order": 0}, r"Shampoo\(order=0\): must be an integer of at least 1"),
        ({"max_factor": -1}, r"Shampoo\(max_factor=-1\): must be an integer, 0"),
        ({"magnitude": "adam"}, r"Shampoo\(magnitude='adam'\): must be one of None, 'adagrad', 'rmsprop'"),
        ({"magnitude": "adagrad"}, r"magnitude='adagrad', graft='gradient'\): either sizes directions"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Shampoo(**options)
