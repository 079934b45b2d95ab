"""SINGD, INGD and IKFAC against their equations, and every structure against matrices written out."""

import copy
import itertools

import pytest
import torch
from rows import model_and_batches
from singd import SingdReference, weights_of
from stepping import stepper

import mkor_fx
from mkor_fx import SINGD
from mkor_fx.rules import Gradient, Shape, Use
from mkor_fx.rules.structures import NAMES, structure_of

DOUBLE = {"factor_dtype": torch.float64, "graft": None}
EACH_STRUCTURE = pytest.mark.parametrize("name", NAMES)


def randn(*size):
    return torch.randn(*size, dtype=torch.float64)


def stored(side, matrix_DD):
    """The numbers of a matrix that has the structure, by what the structure makes of unit matrices."""
    start = torch.zeros_like(side.identity(matrix_DD.device), dtype=matrix_DD.dtype)
    numbers = start.numel()
    units = torch.eye(numbers, dtype=matrix_DD.dtype).reshape(numbers, *start.shape)
    basis = torch.stack([side.matrix(unit).flatten() for unit in units], 1)
    return torch.linalg.lstsq(basis, matrix_DD.flatten()[:, None], driver="gelsd").solution.reshape(start.shape)


# ---- structures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
@EACH_STRUCTURE
def test_a_structure_computes_what_its_matrices_do(name, size):
    torch.manual_seed(0)
    block, corners = 3, (2, 3)
    side, P = structure_of(name, size, block, corners), weights_of(name, size, block, corners)
    kept = (P > 0).double()
    written = [kept * randn(size, size) for _ in range(2)]
    K, M = (stored(side, matrix) for matrix in written)
    same = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for numbers, matrix in zip((K, M), written, strict=True):
        same(side.matrix(numbers), matrix)
    X, (k, m) = randn(5, size), written
    same(side.times(X, K), X @ k)
    same(side.times(X, K, transposed=True), X @ k.T)
    same(side.matrix(side.product(K, M)), k @ m)
    same(side.matrix(side.square(K)), P * (k.T @ k))
    same(side.matrix(side.gram(X)), P * (X.T @ X))
    same(side.matrix(side.identity(X.device)), torch.eye(size))
    same(side.mean_of_diagonal(K), k.trace() / size)
    same(side.bound(K), k.abs().sum(1).max())
    curved = side.congruence(K, side.gram(side.times(X, K) if side.needs_rows else X))
    same(side.matrix(curved), P * (k.T @ X.T @ X @ k))


@EACH_STRUCTURE
def test_a_structure_holds_the_numbers_it_says(name):
    held = {"dense": 64**2, "diagonal": 64, "block": 7 * 10 * 10, "triangular": 64 * 65 // 2, "rank1": 2 * 64 - 1,
            "hierarchical": 4 * 64 + (64 - 4 - 5) + 5 * (64 - 4)}  # fmt: skip
    rule = SINGD(structure=name, block=10, corners=(4, 5), alpha1=0)
    state = rule.init(Shape(3, 64), torch.device("cpu"))
    assert set(state) == {"K", "C"} and state["K"].numel() == held[name]
    sent = rule.summarize(Shape(3, 64), randn(2, 64), randn(2, 3), state)
    assert sent[0].shape == state["K"].shape and sent[1].shape == state["C"].shape


@EACH_STRUCTURE
def test_a_structure_under_vmap_is_each_of_its_members(name):
    torch.manual_seed(0)
    side = structure_of(name, 7, 3, (2, 2))
    K = randn(4, *side.identity(torch.device("cpu")).shape)
    K, X = K * side.identity(torch.device("cpu")) if name == "block" else K, randn(4, 5, 7)
    everything = lambda K, X: (side.times(X, K), side.product(K, K), side.square(K), side.gram(X), side.bound(K))
    for i, found in enumerate(torch.vmap(everything)(K, X)):
        for member in range(4):
            torch.testing.assert_close(found[member], everything(K[member], X[member])[i])


# ---- the rule, as functions -------------------------------------------------------------------------------------------


def fresh(rule, outputs, inputs):
    return {key: t.double() for key, t in rule.init(Shape(outputs, inputs), torch.device("cpu")).items()}


def refreshed(rule, state, L, R, times=1):
    """After refreshes from factors ``L`` and ``R``, for structures that do not need rows."""
    kinds = rule.structure if isinstance(rule.structure, tuple) else (rule.structure,) * 2
    stat = [structure_of(kind, len(F), rule.block, rule.corners).gram(torch.linalg.cholesky(F).T)
            for kind, F in ((kinds[1], R), (kinds[0], L))]  # fmt: skip
    one = torch.ones(()).double()
    for _ in range(times):
        state = rule.update(state, [Use(tuple(stat), one, False)], Gradient(randn(len(L), len(R))), torch.tensor(0))
    return state


def factor(n):
    X = randn(4 * n, n)
    return X.T @ X / len(X)


def test_one_step_of_ikfac_is_a_damped_average_of_the_inverse_to_second_order():
    torch.manual_seed(0)
    L, R, start, damping = factor(3), factor(5), 0.5 * torch.eye(5).double() + 0.1 * randn(5, 5), 0.1
    errors = []
    for beta1 in (1e-2, 1e-3):
        rule = SINGD(form="ikfac", beta1=beta1, alpha1=0, damping=damping, bound=None, **DOUBLE)
        state = refreshed(rule, {**fresh(rule, 3, 5), "K": start}, L, R)
        inverse = (1 - beta1) * torch.linalg.inv(start @ start.T) + beta1 * (R + damping * torch.eye(5))
        errors.append((state["K"] @ state["K"].T - torch.linalg.inv(inverse)).norm())
    assert errors[0] < 1e-3 and 90 < errors[0] / errors[1] < 110


@pytest.mark.parametrize("structure", ["dense", "triangular"])
def test_ikfac_comes_to_rest_where_the_damped_curvature_is_whitened(structure):
    torch.manual_seed(0)
    L, R, damping = factor(3), factor(5), 0.1
    rule = SINGD(form="ikfac", structure=structure, beta1=0.2, damping=damping, alpha1=0.5, **DOUBLE)
    state = refreshed(rule, fresh(rule, 3, 5), L, R, times=400)
    eye = lambda n: torch.eye(n).double()
    for F, name in ((R, "K"), (L, "C")):
        K = structure_of(structure, len(F), 30, (15, 15)).matrix(state[name])
        torch.testing.assert_close(K.T @ (F + damping * eye(len(F))) @ K, eye(len(F)), rtol=0, atol=1e-10)
    G, b = randn(3, 5), randn(3)
    made = rule.precondition(state, Gradient(G, b))
    turned = torch.cat([G @ torch.linalg.inv(R + damping * eye(5)), b[:, None]], 1)
    expected = torch.linalg.inv(L + damping * eye(3)) @ turned
    torch.testing.assert_close(torch.cat([made.weight, made.bias[:, None]], 1), expected, rtol=1e-8, atol=1e-9)


def test_a_diagonal_ikfac_is_the_root_of_the_damped_diagonal():
    torch.manual_seed(0)
    L, R = factor(3), factor(5)
    rule = SINGD(form="ikfac", structure="diagonal", beta1=0.2, damping=0.1, **DOUBLE)
    state = refreshed(rule, fresh(rule, 3, 5), L, R, times=400)
    torch.testing.assert_close(state["K"], (R.diagonal() + 0.1).rsqrt(), rtol=1e-10, atol=0)


def test_ingd_comes_to_rest_where_it_says_and_sees_only_the_product_of_both_curvatures():
    torch.manual_seed(0)
    L, R, damping = factor(3), factor(5), 0.1
    rule = SINGD(beta1=0.2, damping=damping, **DOUBLE)
    start = fresh(rule, 3, 5)
    state = refreshed(rule, start, L, R, times=600)
    other = refreshed(rule, start, 16 * L, R / 16, times=600)
    for key, tensor in state.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-10, atol=1e-10, msg=key)
    K, C = state["K"], state["C"]
    mean = lambda M: M.trace() / len(M)
    still = mean(C.T @ L @ C) * K.T @ R @ K + damping * mean(C.T @ C) * K.T @ K
    torch.testing.assert_close(still, torch.eye(5).double(), rtol=0, atol=1e-10)


def test_uncentred_inputs_let_the_published_normalisation_grow_without_bound_and_the_default_not():
    """``R`` is nearly ``1 1^T``: the largest eigenvalue of ``m`` is its largest entry 200 times."""
    L, R = torch.eye(2).double(), 100 * torch.ones(200, 200).double() + torch.eye(200).double()
    largest = {}
    for bound in ("norm", "entries"):
        rule = SINGD(form="ikfac", bound=bound, alpha1=0, beta1=0.02, **DOUBLE)
        state = fresh(rule, 2, 200)
        for _ in range(4):
            state = refreshed(rule, state, L, R, times=5)
        largest[bound] = float(torch.linalg.matrix_norm(state["K"], 2))
        if bound == "norm":
            assert torch.linalg.eigvalsh((state["K"] + state["K"].T) / 2)[0] > 0
    assert largest["norm"] < 2 and largest["entries"] > 1e3


@EACH_STRUCTURE
def test_a_direction_is_the_product_of_both_inverses(name):
    torch.manual_seed(0)
    rule = SINGD(structure=(name, "diagonal"), block=2, corners=(1, 1), **DOUBLE)
    state = fresh(rule, 4, 6)
    state |= {"C": randn(*state["C"].shape), "K": randn(*state["K"].shape)}
    C, K = structure_of(name, 4, 2, (1, 1)).matrix(state["C"]), state["K"].diag()
    G, b = randn(4, 6), randn(4)
    made = rule.precondition(state, Gradient(G, b))
    torch.testing.assert_close(made.weight, C @ C.T @ G @ K @ K.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made.bias, C @ C.T @ b, rtol=1e-10, atol=1e-10)


def test_a_side_without_a_factor_counts_as_the_identity():
    """So the other side's steps are those of IKFAC."""
    torch.manual_seed(0)
    L, shape, states = factor(3), Shape(3, 50, lookup=True), []
    for form in ("singd", "ikfac"):
        rule = SINGD(form=form, **DOUBLE)
        state = rule.init(shape, torch.device("cpu"))
        assert set(state) == {"C", "C_momentum"}
        use = Use((randn(0), L), torch.ones(()).double(), False)
        states.append(rule.update(state, [use], Gradient(randn(3, 50)), torch.tensor(0)))
    assert torch.equal(states[0]["C"], states[1]["C"]) and not torch.equal(states[0]["C"], torch.eye(3).double())
    assert not SINGD(max_factor=2).init(Shape(3, 4), torch.device("cpu"))
    assert SINGD(max_factor=2, structure="diagonal").init(Shape(3, 4), torch.device("cpu"))


# ---- in both doors ----------------------------------------------------------------------------------------------------


def trajectories(door, kind, rule, refresh_every, steps=6):
    model, loss_fn, batches = model_and_batches(kind, steps)
    twin = copy.deepcopy(model)
    structure = rule.structure if isinstance(rule.structure, tuple) else (rule.structure,) * 2
    reference = SingdReference(twin, structure, rule.form, refresh_every, rule.block, rule.corners, rule.damping, 0.1,
                               rule.alpha1, rule.bound, 0.05, 0.01)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    held = {p for module, _ in reference.layers.values() for p in module.parameters()}
    rest = [p for p in twin.parameters() if p not in held]
    others = torch.optim.SGD(rest, lr=0.05, momentum=0.9, weight_decay=0.01) if rest else None
    done, step = stepper(door, model, loss_fn, optimizer, rule, refresh_every=refresh_every)
    for x, y in batches:
        step(x, y)
        twin.zero_grad()
        loss_fn(twin(x), y).backward()
        reference.step()
        if others is not None:
            others.step()
    start = model_and_batches(kind, 0)[0]
    for p, q, old in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
        assert not torch.equal(p, old)
    for (name, side), K in reference.K.items():
        size, which = len(K), structure[side == "K"]
        found = structure_of(which, size, rule.block, rule.corners).matrix(done.mkor.state_dict()[f"{name}.{side}"])
        torch.testing.assert_close(found, K, rtol=1e-9, atol=1e-10)


MIXED = ("rank1", "block")


EVERY_RUN = {("singd", "dense", "compile_step"), ("singd", "hierarchical", "compile"), ("ikfac", MIXED, "compile_step")}


@pytest.mark.parametrize(("form", "structure", "door"), [
    pytest.param(*case, marks=[] if case in EVERY_RUN else pytest.mark.nightly)
    for case in itertools.product(("singd", "ikfac"), (*NAMES, MIXED), ("compile_step", "compile"))
])  # fmt: skip
def test_a_perceptron_goes_the_way_of_the_equations(form, structure, door):
    rule = SINGD(structure=structure, form=form, beta1=0.1, block=3, corners=(2, 2), damping=0.01, **DOUBLE)
    trajectories(door, "mlp", rule, 2)


@pytest.mark.parametrize("options", [
    {"bound": None, "alpha1": 0}, pytest.param({"bound": "entries"}, marks=pytest.mark.nightly),
], ids=["plain", "entries"])  # fmt: skip
def test_so_it_does_with_other_steps(options):
    trajectories("compile_step", "mlp", SINGD(form="ikfac", beta1=0.1, damping=0.01, **options, **DOUBLE), 1)


@pytest.mark.nightly
@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("kind", ["cnn", "transformer"])
@pytest.mark.parametrize("structure", [*NAMES, MIXED], ids=[*NAMES, "mixed"])
def test_so_do_a_convolution_and_a_transformer(structure, kind, door):
    trajectories(door, kind, SINGD(structure=structure, beta1=0.1, block=3, corners=(2, 2), damping=0.01, **DOUBLE), 2)


class Square(torch.nn.Module):
    """One square weight, used both ways."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(randn(5, 5))

    def forward(self, x):
        return torch.tanh(x @ self.weight.T) @ self.weight


@pytest.mark.parametrize("door", ["compile_step", pytest.param("compile", marks=pytest.mark.nightly)])
def test_a_square_weight_that_is_used_both_ways_keeps_its_sides_apart(door):
    """Which side a statistic is of, no shape tells: ``H`` of the second use goes to the other factors."""
    torch.manual_seed(0)
    model, x, y = Square(), randn(12, 5), randn(12, 5)
    rule = SINGD(structure=("diagonal", "rank1"), form="ikfac", beta1=0.1, alpha1=0, bound=None, damping=0.01, **DOUBLE)
    hidden = torch.tanh(x @ model.weight.T)
    middle, out = hidden.atanh().detach().requires_grad_(), None
    hidden = torch.tanh(middle)
    out = hidden @ model.weight
    g_out, g_middle = torch.autograd.grad((out - y).square().mean(), [out, middle])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if door == "compile_step":
        done = mkor_fx.compile_step(model, torch.nn.functional.mse_loss, optimizer, rule, backend="eager")
        done(x, y)
    else:
        done = mkor_fx.compile(model, rule, backend="eager")
        torch.nn.functional.mse_loss(done(x), y).backward()
        optimizer.step()
    state = done.mkor.state_dict()
    R = (x.T @ x / 12 + 12 * g_out.T @ g_out) / 2  # along the columns of W: inputs of one use, outputs of the other
    L = (12 * g_middle.T @ g_middle + hidden.T @ hidden / 12) / 2
    eye, P = torch.eye(5).double(), weights_of("rank1", 5, 1, (0, 1))
    K = structure_of("rank1", 5, 1, (0, 1)).matrix(state["weight.K"])
    along = {"K": K, "C": state["weight.C"].diag()}
    expected = {"K": eye - 0.05 * (P * R + 0.01 * eye - eye), "C": eye - 0.05 * (eye * L + 0.01 * eye - eye)}
    swapped = {"K": eye - 0.05 * (P * L + 0.01 * eye - eye), "C": eye - 0.05 * (eye * R + 0.01 * eye - eye)}
    found = [(along[n] - expected[n]).norm() for n in "KC"], [(along[n] - swapped[n].detach()).norm() for n in "KC"]
    assert max(found[0]) < 1e-10 < 1e-3 < max(found[1])


@pytest.mark.nightly
def test_numbers_that_change_are_numbers():
    states = []
    for beta1, damping in ((0.1, 0.01), (lambda step: 0.1, torch.tensor(0.01, dtype=torch.float64))):
        model, loss_fn, batches = model_and_batches("mlp", 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = mkor_fx.compile_step(model, loss_fn, optimizer, SINGD(beta1=beta1, damping=damping), backend="eager")
        for x, y in batches:
            step(x, y)
        states.append(step.mkor.state_dict())
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "sent"), [
    ("rank1", 13 + 11 + 1), ("diagonal", 7 + 6 + 1), ("triangular", 28 + 21 + 1),
])  # fmt: skip
def test_what_crosses_the_network_are_the_numbers_of_the_structures(name, sent):
    """Of a side of 7 and one of 6, and the number of rows."""
    model, loss_fn, batches = model_and_batches("mlp", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, SINGD(structure=name), backend="eager")
    step(*batches[0])
    assert step.coverage["0.weight"].sent == sent


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structure": "toeplitz"}, r"SINGD\(structure='toeplitz'\): must be one of 'dense'"),
        ({"structure": ("dense",)}, r"SINGD\(structure=\('dense',\)\): must be one of"),
        ({"form": "kfac"}, r"SINGD\(form='kfac'\): must be one of 'singd', 'ikfac'"),
        ({"bound": True}, r"SINGD\(bound=True\): must be one of 'norm', 'entries', None"),
        ({"alpha1": 1.0}, r"SINGD\(alpha1=1\.0\): must be a number in \[0, 1\)"),
        ({"damping": 0.0}, r"SINGD\(damping=0\.0\): must be positive"),
        ({"beta1": -1.0}, r"SINGD\(beta1=-1\.0\): must be positive"),
        ({"block": 0}, r"SINGD\(block=0\): must be an integer of at least 1"),
        ({"corners": (15,)}, r"SINGD\(corners=\(15,\)\): must be two integers"),
        ({"corners": (-1, 2)}, r"SINGD\(corners=\(-1, 2\)\): must be two integers"),
        ({"max_factor": 1.5}, r"SINGD\(max_factor=1\.5\): must be an integer"),
        ({"factor_dtype": torch.int64}, r"SINGD\(factor_dtype=torch\.int64\): must be float32"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SINGD(**options)


def test_structures_that_need_rows_are_not_placed_on_owners():
    model, loss_fn, _ = model_and_batches("mlp", 0)
    optimizer, rule = torch.optim.SGD(model.parameters(), lr=0.1), SINGD(structure=("dense", "rank1"))
    with pytest.raises(ValueError, match=r"reads_state.*placement='replicated'"):
        mkor_fx.compile_step(model, loss_fn, optimizer, rule, placement="owner", backend="eager")
    assert [SINGD(structure=name).reads_state for name in NAMES] == [False] * 4 + [True] * 2
