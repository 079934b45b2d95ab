"""EKFAC against its equations, written out here without the rule."""

import pytest
import torch
from side_by_side import batched, matrices, side_by_side, wide
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import EKFAC, KFAC
from mkor_fx.rules import Gradient, Shape, Use

DECAY, SCALING_DECAY, DAMPING = 0.9, 0.8, 1e-2
SGD = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)


def rows_of(count, outputs, inputs):
    """Correlated inputs and output gradients of a mean loss."""
    a_NI = torch.randn(count, inputs).double() @ torch.randn(inputs, inputs).double()
    return a_NI, (torch.randn(count, outputs).double() * a_NI[:, :1].abs()) / count


def measured(rule, state, shape, a_NI, g_NO):
    """The state behind one refresh."""
    read = {"state": state} if rule.reads_state else {}
    use = Use(rule.summarize(shape, a_NI, g_NO, **read), torch.tensor(float(len(a_NI))).double(), False)
    return rule.update(state, [use], Gradient(g_NO.T @ a_NI, g_NO.sum(0) if shape.bias else None), torch.tensor(0))


def fitted(count, bias=True, **options):
    """``(rule, state, a, g)`` with bases and scaling of the same rows."""
    rule, shape = wide(EKFAC)(decay=0.0, scaling_decay=0.0, damping=DAMPING, graft=None, **options), Shape(4, 6, bias)
    a_NI, g_NO = rows_of(count, 4, 6)
    state = rule.derive(measured(rule, rule.init(shape, torch.device("cpu")), shape, a_NI, g_NO))
    return rule, measured(rule, state, shape, a_NI, g_NO), a_NI, g_NO


def test_the_scaling_is_the_nearest_diagonal():
    """Of all in these bases to the empirical Fisher matrix, of the weight and of the bias."""
    _, state, a_NI, g_NO = fitted(9)
    each = torch.einsum("no,ni->noi", 9 * g_NO, a_NI).flatten(1)
    for F, U, s in (
        (each.T @ each / 9, torch.kron(state["L_basis"], state["R_basis"]), state["scaling"].flatten()),
        (9 * g_NO.T @ g_NO, state["L_basis"], state["bias_scaling"]),
    ):
        torch.testing.assert_close(s, (U.T @ F @ U).diagonal(), rtol=1e-10, atol=1e-12)
        distance = lambda diagonal, F=F, U=U: (F - U @ diagonal.diag() @ U.T).norm()
        for _ in range(5):
            assert distance(s) < distance(s + 1e-3 * s.norm() * torch.randn(len(s)).double())
    product = torch.outer(state["L_values"], state["R_values"]).flatten()
    each, U = each.T @ each / 9, torch.kron(state["L_basis"], state["R_basis"])
    assert (each - U @ state["scaling"].flatten().diag() @ U.T).norm() < 0.99 * (each - U @ product.diag() @ U.T).norm()


@pytest.mark.parametrize("scaling", ["rows", "gradient"])
def test_of_one_row_the_curvature_is_exact(scaling):
    rule, state, a_NI, g_NO = fitted(1, scaling=scaling)
    G = g_NO.T @ a_NI
    found = rule.precondition(state, Gradient(G, g_NO[0]))
    length = a_NI.square().sum() * g_NO.square().sum()
    torch.testing.assert_close(found.weight, G / (length + DAMPING), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.bias, g_NO[0] / (g_NO.square().sum() + DAMPING), rtol=1e-10, atol=1e-12)
    V = torch.randn(4, 6).double()  # (F + damping)^-1 of any other
    v = G.flatten()
    expected = torch.linalg.solve(torch.outer(v, v) + DAMPING * torch.eye(24).double(), V.flatten()).view(4, 6)
    torch.testing.assert_close(rule.precondition(state, Gradient(V)).weight, expected, rtol=1e-9, atol=1e-9)


def test_in_new_bases_it_is_kfac_until_it_is_measured():
    rule, state, *_ = fitted(9)
    derived, grad = rule.derive(state), Gradient(torch.randn(4, 6).double(), torch.randn(4).double())
    same = KFAC(inverse="eigen", damping=DAMPING, graft=None).precondition(derived, grad)
    for one, other in zip(rule.precondition(derived, grad), same, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rule.precondition(state, grad).weight, same.weight, rtol=0.01)
    before = rule.init(Shape(4, 6, bias=True), torch.device("cpu"))
    assert torch.equal(rule.precondition(before, grad).weight, grad.weight)  # no bases yet


@pytest.mark.parametrize(("missing", "kept"), [(5, "L"), (3, "")])
def test_a_side_without_a_factor_counts_as_one(missing, kept):
    rule, shape = wide(EKFAC)(max_factor=missing, decay=0.0, scaling_decay=0.0, damping=DAMPING, graft=None), Shape(4, 6)
    state = rule.init(shape, torch.device("cpu"))
    if not kept:
        assert state == {} and rule.without_state(shape) == "both sides exceed max_factor=3"
        return
    for inputs_first in (False, True):
        shape = Shape(6, 4) if inputs_first else Shape(4, 6)
        a_NI, g_NO = rows_of(9, shape.O, shape.I)
        state = measured(rule, rule.init(shape, torch.device("cpu")), shape, a_NI, g_NO)
        state = measured(rule, rule.derive(state), shape, a_NI, g_NO)
        side, F = ("R", a_NI.T @ a_NI / 9) if inputs_first else ("L", 9 * g_NO.T @ g_NO)
        torch.testing.assert_close(state["scaling"].flatten(), state[f"{side}_values"], rtol=1e-9, atol=1e-10)
        G, damped = g_NO.T @ a_NI, F + DAMPING * torch.eye(4).double()
        D = torch.linalg.solve(damped, G.T).T if inputs_first else torch.linalg.solve(damped, G)
        torch.testing.assert_close(rule.precondition(state, Gradient(G)).weight, D, rtol=1e-8, atol=1e-8)
        scaled = rule.unscale(rule.summarize(shape, a_NI, 8 * g_NO, state=state), torch.tensor(8.0).double())
        for one, other in zip(scaled, rule.summarize(shape, a_NI, g_NO, state=state), strict=True):
            torch.testing.assert_close(one, other)


class Reference:
    """Eager EKFAC on hooks, in front of a base optimizer. Rows are pairs ``o`` and ``i`` along the outputs and the inputs of
    a weight, whose products are the rows' own gradients. Bases are nobody's choice where eigenvalues are equal: those of
    ``state`` are taken once they are seen to be eigenvectors."""

    def __init__(self, model, optimizer, scaling, every):
        vars(self).update(optimizer=optimizer, scaling=scaling, every=every, t=0, rows={}, held={}, biases={})
        self.sites, names = matrices(model), {p: name for name, p in model.named_parameters()}
        for module in model.modules():
            name = names.get(getattr(module, "weight", None))
            if name in self.sites:
                self.biases[name] = self.biases.get(name, getattr(module, "bias", None))
                module.register_forward_hook(lambda m, x, y, name=name: self.watch(name, m, x[0].detach(), y))

    def watch(self, name, module, x, y):
        def record(g):
            a, table = x, isinstance(module, nn.Embedding)
            if isinstance(module, nn.Conv2d):
                a = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
                g = g.flatten(2).mT
            a = functional.one_hot(x, len(module.weight)).double() if table else a
            a, g = a.flatten(0, -2), g.flatten(0, -2) * a[..., 0].numel()
            head_too = table and not self.sites[name][2]
            self.rows.setdefault(name, []).append((a, g) if head_too else (g, a))

        y.requires_grad and y.register_hook(record)

    @torch.no_grad()
    def step(self, state):
        for name in self.sites:
            self.site(name, state)
        self.rows, self.t = {}, self.t + 1
        self.optimizer.step()

    def site(self, name, state):
        (weight, matrix, lookup), bias, uses = self.sites[name], self.biases[name], self.rows[name]
        h, G, N = self.held.setdefault(name, {}), matrix(weight.grad), len(uses[0][0])
        uses = [(o, torch.ones(len(o), 1).double() if lookup else i) for o, i in uses]
        for key, side in (("L", 0), ("R", 1)):
            new = sum(use[side].T @ use[side] / len(use[side]) for use in uses) / len(uses)
            h[key] = DECAY * h[key] + (1 - DECAY) * new if key in h else new
        if "Q" in h:
            (Q, P), b = h["Q"], None if bias is None else bias.grad
            turn = lambda M: Q.T @ M if lookup else Q.T @ M @ P
            if self.scaling == "rows":
                new = sum(((o @ Q) ** 2).T @ (i @ P) ** 2 / len(o) for o, i in uses) / len(uses)
                of_bias = ((uses[0][0] @ Q) ** 2).mean(0)
            else:
                new, of_bias = N * turn(G) ** 2, N * (Q.T @ (G[:, 0] if b is None else b)) ** 2
            h["S"] = SCALING_DECAY * h["S"] + (1 - SCALING_DECAY) * new
            h["s"] = SCALING_DECAY * h["s"] + (1 - SCALING_DECAY) * of_bias
            D = Q @ (turn(G) / (h["S"] + DAMPING))
            D = D if lookup else D @ P.T
            weight.grad.copy_((D.T if lookup else D).reshape(weight.shape) * (G.norm() / D.norm()))
            if b is not None:
                D = Q @ ((Q.T @ b) / (h["s"] + DAMPING))
                b.copy_(D * (b.norm() / D.norm()))
        if self.t % self.every == 0:
            h["Q"] = [self.basis(h[key], state.get(f"{name}.{key}_basis")) for key in "LR"]
            h["s"], q_R = ((Q.T @ F @ Q).diagonal() for F, Q in zip((h["L"], h["R"]), h["Q"], strict=True))
            h["S"] = torch.outer(h["s"], q_R)

    def basis(self, F, Q):
        eye = torch.eye(len(F)).double()
        if Q is None:
            return eye
        inside = Q.T @ F @ Q
        assert (Q.T @ Q - eye).norm() < 1e-10 and (inside - inside.diagonal().diag()).norm() < 1e-8 * F.norm()
        return Q.clone()


def beside(built, door, scaling, every=3, tolerance=1e-7):
    rule = wide(EKFAC)(decay=DECAY, scaling=scaling, scaling_decay=SCALING_DECAY, damping=DAMPING, derive_every=every)
    reference = lambda model, optimizer: Reference(model, optimizer, scaling, every)
    return side_by_side(built, rule, door, SGD, reference, tolerance)


@pytest.mark.parametrize(("name", "scaling", "door"), [
    ("mlp", "rows", "compile_step"),
    ("mlp", "rows", "compile"),
    ("mlp", "gradient", "compile_step"),
    pytest.param("mlp", "gradient", "compile", marks=pytest.mark.nightly),
    *(pytest.param(name, scaling, door, marks=pytest.mark.nightly) for name, scaling in
      (("cnn", "rows"), ("cnn", "gradient"), ("gpt", "rows")) for door in ("compile_step", "compile")),
])  # fmt: skip
def test_both_doors_follow_the_equations(name, scaling, door):
    beside(batched(name, 8, 2), door, scaling)


class SquareTable(nn.Module):
    """As many words as the table is wide, so that no size says which way round a use has it."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 6), nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def test_a_square_weight_that_is_used_both_ways_round():
    words = lambda: torch.randint(0, 6, (5, 4))
    loss_fn = lambda outputs, target: functional.cross_entropy(outputs.flatten(0, 1), target.flatten())
    built = SquareTable().double(), loss_fn, [(words(), words()) for _ in range(6)]
    beside(built, "compile_step", "rows", every=2)


def test_what_crosses_the_network():
    for rule, sent in ((EKFAC(), 36 + 16 + 24 + 4 + 1), (EKFAC(scaling="gradient"), 36 + 16 + 1)):
        model = nn.Linear(6, 4)
        step = mkor_fx.compile_step(model, functional.mse_loss, SGD(model.parameters()), rule, backend="eager")
        step(torch.randn(8, 6), torch.randn(8, 4))
        assert step.coverage["weight"].sent == sent


def test_lookups_are_declined_where_the_gradient_scales():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    rule = EKFAC(scaling="gradient")
    step = mkor_fx.compile_step(model, functional.mse_loss, SGD(model.parameters()), rule, backend="eager")
    step(torch.randint(0, 9, (8,)), torch.randn(8, 4))
    assert "lookup" in str(step.coverage["0.weight"]) and not [k for k in step.mkor.state_dict() if k.startswith("0.")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scaling": "row"}, r"EKFAC\(scaling='row'\): must be 'rows' or 'gradient'"),
        ({"scaling_decay": 1.0}, r"EKFAC\(scaling_decay=1\.0\): the weight of the old average"),
        ({"decay": -0.1}, r"EKFAC\(decay=-0\.1\): the weight of the old average"),
        ({"damping": 0.0}, r"EKFAC\(damping=0\.0\): must be positive"),
        ({"max_factor": -1}, r"EKFAC\(max_factor=-1\): must be an integer"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        EKFAC(**options)


@pytest.mark.parametrize("option", ["inverse", "pi", "newton_steps"])
def test_options_of_other_inverses_are_no_options(option):
    with pytest.raises(TypeError, match=option):
        EKFAC(**{option: "eigen"})
    assert f"{option}=" not in repr(EKFAC())
