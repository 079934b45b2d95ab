"""CG-FAC against its equations, written out here without the rule."""

import pytest
import torch
from hashed import signs
from side_by_side import Directed, side_by_side, small
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import CGFAC
from mkor_fx.rules import Gradient, Shape, Use
from mkor_fx.rules.cgfac import conjugate_gradients

DECAY, DAMPING, TOLERANCE = 0.8, 0.03, 1e-2
SELDOM = [pytest.param(kind, marks=pytest.mark.nightly) for kind in ("cnn", "transformer")]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solve_by_hand(L, R, G, start, iterations):
    """Of vectors, with the whole matrix in front of them, and an end."""
    A = torch.kron(L, R) + DAMPING * torch.eye(G.numel()).double()
    g, x = G.flatten(), torch.zeros(G.numel()).double()
    if start is not None and start.any():
        x = start.flatten() * (start.flatten() @ g) / (start.flatten() @ A @ start.flatten())
    r = p = g - A @ x
    for _ in range(iterations):
        if r @ r <= TOLERANCE * (g @ g):
            break
        alpha = (r @ r) / (p @ A @ p)
        x, new = x + alpha * p, r - alpha * A @ p
        r, p = new, new + (new @ new) / (r @ r) * p
    return x.view_as(G)


class ByHand:
    def __init__(self, warm_start, iterations, rank=None, every=1):
        self.warm_start, self.iterations, self.rank, self.every = warm_start, iterations, rank, every
        self.factors, self.last = {}, {}

    def __call__(self, name, t, a, g, G, b):
        if t % self.every == 0 and self.rank:
            X, Y = (signs(t << 32, side, len(a), self.rank).T @ rows for side, rows in ((1, g), (0, a)))
            self.factors[name] = len(a) * X.T @ X / self.rank, Y.T @ Y / self.rank / len(a)
        elif t % self.every == 0:
            new, old = (len(g) * g.T @ g, a.T @ a / len(a)), self.factors.get(name)
            self.factors[name] = new if old is None else [DECAY * o + (1 - DECAY) * n for o, n in zip(old, new, strict=True)]
        L, R = self.factors[name]
        made = [self.solved(name, L, R, G)]
        made += [None] if b is None else [self.solved(f"{name} bias", L, torch.ones(1, 1).double(), b[:, None])[:, 0]]
        return [D if D is None else D * (raw.norm() / D.norm()) for D, raw in zip(made, (G, b), strict=True)]

    def solved(self, key, L, R, G):
        self.last[key] = solve_by_hand(L, R, G, self.last.get(key) if self.warm_start else None, self.iterations)
        return self.last[key]


def beside(kind, door, rule, hand, **options):
    """The state behind some steps. Embeddings are SGD's."""
    reference, skip = lambda model, optimizer: Directed(model, optimizer, hand), ["embed.*"] if kind == "transformer" else []
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    return side_by_side(small(kind), rule, door, sgd, reference, 1e-3, skip=skip, **options)[0]


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize(("kind", "warm_start", "iterations", "every"), [
    ("mlp", True, 2, 2), ("mlp", False, 12, 1),
    *(pytest.param(kind, True, 4, 1, marks=pytest.mark.nightly) for kind in ("cnn", "transformer")),
])  # fmt: skip
def test_equations(kind, door, warm_start, iterations, every):
    """Of 12 iterations some stand still, as the loop here ends."""
    rule = CGFAC(decay=DECAY, damping=DAMPING, iterations=iterations, tolerance=TOLERANCE, warm_start=warm_start)
    beside(kind, door, rule, ByHand(warm_start, iterations, every=every), refresh_every=every)


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("kind", ["mlp", *SELDOM])
def test_equations_of_sketches(kind, door):
    rule = CGFAC(curvature="sketches", rank=9, damping=DAMPING, iterations=3, tolerance=TOLERANCE)
    state = beside(kind, door, rule, ByHand(True, 3, rank=9))
    assert f"{'head' if kind == 'transformer' else '0'}.weight.L_rows" in state


def solved(L, R, G, b=None, start=None, **options):
    """What the rule comes to from float64 factors, and its state."""
    rule = CGFAC(damping=DAMPING, tolerance=0.0, **options)
    state = {"L": L, "R": R, "seen": torch.ones(()).double(), "solution": torch.zeros_like(G) if start is None else start}
    state |= {} if b is None else {"bias_solution": torch.zeros(len(b), 1).double()}
    state = rule.advance(state, Gradient(G, b), torch.tensor(0))
    return rule.precondition(state, Gradient(0 * G, b))


def test_as_many_iterations_as_eigenvalues_are_the_inverse():
    """Of ``L`` with two and ``R`` with three: six products."""
    Q, P, G, b = torch.linalg.qr(randn(5, 5))[0], torch.linalg.qr(randn(4, 4, seed=1))[0], randn(5, 4), randn(5, seed=2)
    L = Q @ torch.tensor([1.0, 1, 1, 2, 2]).double().diag() @ Q.T
    R = P @ torch.tensor([1.0, 3, 3, 7]).double().diag() @ P.T
    whole = torch.kron(L, R) + DAMPING * torch.eye(20).double()
    expected = torch.linalg.solve(whole, G.flatten()).view(5, 4)
    made = solved(L, R, G, b, iterations=6)
    torch.testing.assert_close(made.weight, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(made.bias, torch.linalg.solve(L + DAMPING * torch.eye(5).double(), b), rtol=1e-9, atol=1e-11)
    fewer = solved(L, R, G, b, iterations=3).weight
    assert (fewer - expected).norm() > 1e-3 * expected.norm()
    G, eye = randn(5, 5), torch.eye(5).double()
    torch.testing.assert_close(solved(eye, eye, G, iterations=1).weight, G / (1 + DAMPING), rtol=1e-12, atol=0)


def test_a_warm_start_goes_on_and_is_a_direction_of_descent_from_anywhere():
    factors = [rows.T @ rows for rows in (randn(9, 5), randn(9, 4, seed=1))]
    G = randn(5, 4, seed=3)
    cold, more = solved(*factors, G, iterations=4).weight, solved(*factors, G, iterations=8).weight
    warm = solved(*factors, G, start=cold, iterations=4).weight
    error = lambda D: (factors[0] @ D @ factors[1] + DAMPING * D - G).norm()
    assert error(warm) < 0.7 * error(cold) and error(more) < error(cold)
    found = solved(*factors, G, start=-3 * more, iterations=1).weight  # a multiple is taken for what it is
    assert error(found) < error(cold)
    for seed in range(20):
        made = solved(*factors, G, start=randn(5, 4, seed=seed), iterations=1).weight
        assert (made * G).sum() > 0


def test_it_stands_still_where_it_has_converged():
    A = randn(30, 6)
    A, G, products = A.T @ A, randn(6, 1), []

    def operator(V):
        products.append(V)
        return A @ V

    few = conjugate_gradients(operator, G, None, 3, 1e-2)
    reached = (G - A @ few).square().sum()
    assert reached <= 1e-2 * G.square().sum()
    assert torch.equal(conjugate_gradients(operator, G, None, 50, 1e-2), few) and len(products) == 53
    assert not conjugate_gradients(operator, 0 * G, few, 5, 1e-2).any()
    large = 1e30 * torch.ones(3, 1)
    assert torch.equal(conjugate_gradients(lambda V: V, large, None, 5, 1e-2), large)  # whose square is none


def test_sketches_are_unbiased_and_of_ranks_and_micro_batches_together():
    a, g, rule, shape = randn(12, 4), randn(12, 3, seed=1), CGFAC(curvature="sketches", rank=200), Shape(3, 4)
    found, rows = [], torch.tensor(12.0).double()
    for draw in range(60):
        keys = [torch.tensor((draw << 32) + part) for part in range(2)]
        parts = [rule.summarize(shape, a[i::2], g[i::2], key=key) for i, key in enumerate(keys)]
        state = {k: t.double() for k, t in rule.init(shape, torch.device("cpu")).items()}
        use = Use(tuple(sum(pair) for pair in zip(*parts, strict=True)), rows, False)
        state = rule.update(state, [use], Gradient(g.T @ a), torch.tensor(0))
        L, R = (state[f"{name}_rows"].T @ state[f"{name}_rows"] for name in "LR")
        found.append(torch.kron(L, R))
    expected = torch.kron(12 * g.T @ g, a.T @ a / 12)
    assert (torch.stack(found).mean(0) - expected).norm() < 0.05 * expected.norm()
    assert (found[0] - expected).norm() > 0.05 * expected.norm()


def test_what_it_keeps():
    for curvature, expected in (("factors", {"L"}), ("sketches", {"L_rows", "R_rows"})):
        model = nn.Linear(40, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = CGFAC(curvature=curvature, max_factor=8, rank=5)
        step = mkor_fx.compile_step(model, mse_loss, optimizer, rule, backend="eager")
        step(torch.randn(16, 40), torch.randn(16, 4))
        kept = {key.removeprefix("weight.") for key in step.mkor.state_dict()} - {"step"}
        assert kept == expected | {"seen", "solution", "bias_solution"}
        assert step.coverage["weight"].sent == (4 * 4 if curvature == "factors" else 5 * 44) + 1


def test_numbers_that_change_are_numbers():
    found = []
    for options in ({"damping": 0.1, "tolerance": 0.05}, {"damping": lambda t: 0.1, "tolerance": lambda t: 0.05}):
        torch.manual_seed(0)
        model = nn.Linear(6, 4).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = mkor_fx.compile_step(model, mse_loss, optimizer, CGFAC(**options), backend="eager")
        for _ in range(3):
            step(torch.randn(16, 6).double(), torch.randn(16, 4).double())
        found.append(model.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.0}, r"CGFAC\(damping=0\.0\): must be positive"),
        ({"decay": 1.0}, r"CGFAC\(decay=1\.0\): the weight of the old average"),
        ({"iterations": 0}, r"CGFAC\(iterations=0\): must be an integer of at least 1"),
        ({"rank": 2.5}, r"CGFAC\(rank=2\.5\): must be an integer of at least 1"),
        ({"tolerance": -1.0}, r"CGFAC\(tolerance=-1\.0\): must be 0 \(never\) or more"),
        ({"curvature": "rows"}, r"CGFAC\(curvature='rows'\): must be 'factors' or 'sketches'"),
        ({"max_factor": -1}, r"CGFAC\(max_factor=-1\): must be an integer"),
        ({"kl_clip": 0.0, "graft": None}, r"CGFAC\(kl_clip=0\.0\): must be positive"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        CGFAC(**options)
