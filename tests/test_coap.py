"""COAP: its projections in closed form, beside an independent reference, alone and in both doors."""

import copy

import numpy as np
import pytest
import stepping
import torch
from torch import nn
from torch.nn import functional

from mkor_fx import MKOR
from mkor_fx.optim import COAP
from mkor_fx.optim.coap import sketch, slope

OFTEN = {"every": 2, "sketch_every": 2}
SHAPES = {"tall": (6, 4), "wide": (4, 6), "square": (5, 5)}


def build(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)
    model = nn.Sequential(*layers).to(dtype)
    return model, [(torch.randn(8, 2, 3, 3, dtype=dtype), torch.randint(4, (8,))) for _ in range(12)]


def stepper(door, model, optimizer, rule=None, backend="eager"):
    return stepping.stepper(door, model, functional.cross_entropy, optimizer, rule, backend)[1]


# ---- the reference: a matrix as in the paper, P beside the shorter side whichever that is ----------------------------


class Reference:
    """One tensor, in numpy and, for the gradient of P, by autograd. ``began`` is P before the first sketch, ``[r, n]``."""

    def __init__(self, p, o, began=None):
        self.p, self.o, self.t, self.P = p.copy(), dict(o), 0, None
        self.began, self.m, self.v = began, 0.0, 0.0

    def loss(self, P, M, G):
        right = G.shape[0] >= G.shape[1]
        back = G @ P.T @ P if right else P.T @ P @ G
        cosines = functional.cosine_similarity(M @ P if right else P.T @ M, G, dim=1)
        return (back - G).square().mean() * (1 - cosines.mean())

    def moved(self, G):
        M, P = (torch.from_numpy(a) for a in (self.m, self.P))
        P.requires_grad_()
        (D,) = torch.autograd.grad(self.loss(P, M, torch.from_numpy(G)), P)
        return self.P - 0.1 * D.numpy() / max(1, np.linalg.norm(D.numpy()))

    def sketched(self, G, own):
        """Rows have no sign of their own: they get those of ``own``."""
        A = G if G.shape[0] >= G.shape[1] else G.T
        Q, _ = np.linalg.qr(A @ (self.began if self.P is None else self.P).T)
        P = np.linalg.svd(Q.T @ A, full_matrices=False)[2]
        return P * np.sign((P * own).sum(1, keepdims=True))

    def step(self, g, lr, own=None):
        o, (b1, b2) = self.o, self.o["betas"]
        matrix = g.ndim > 1
        if matrix:
            G, k = g.reshape(len(g), -1), self.t
            right = G.shape[0] >= G.shape[1]
            if k % (o["every"] * o["sketch_every"]) == 0:
                self.P = self.sketched(G, own)
            elif k % o["every"] == 0:
                self.P = self.moved(G)
            small = G @ self.P.T if right else self.P @ G
        else:
            small = g
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * small
        self.v = b2 * self.v + (1 - b2) * small**2
        u = self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + o["eps"])
        if matrix:
            u = o["scale"] * (u @ self.P if right else self.P.T @ u).reshape(g.shape)
        self.p = self.p * (1 - lr * o["weight_decay"]) - lr * u


@pytest.mark.parametrize("door", ["eager", "compile_step"])
@pytest.mark.parametrize("options", [OFTEN, {"weight_decay": 0.1, "ratio": 4, "scale": 0.5, "every": 3, "sketch_every": 1}])
def test_beside_the_reference(options, door):
    model, batches = build()
    optimizer, twin = COAP(model.parameters(), lr=0.01, **options), copy.deepcopy(model)
    began = COAP(twin.parameters(), **options)
    step, group, references = stepper(door, model, optimizer), optimizer.param_groups[0], []
    for q in twin.parameters():
        fresh = began.fresh_state(group, q, torch.float64)
        references.append(Reference(q.detach().numpy(), group, fresh.get("projection", q.detach()).numpy()))
    for t, (x, y) in enumerate(batches, start=1):
        group["lr"] = 0.02 / t
        grads = torch.autograd.grad(functional.cross_entropy(twin(x), y), list(twin.parameters()))
        step(x, y)
        for p, q, g, reference in zip(model.parameters(), twin.parameters(), grads, references, strict=True):
            reference.step(g.numpy(), 0.02 / t, optimizer.state[p].get("projection", q.detach()).numpy())
            q.data.copy_(torch.from_numpy(reference.p))
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
            if reference.P is not None:
                kept = optimizer.state[p]["projection"]
                torch.testing.assert_close(kept, torch.from_numpy(reference.P), rtol=1e-9, atol=1e-9)
    if door == "compile_step":
        assert step.compilations == (3 if group["sketch_every"] > 1 else 2)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("identity", [True, False])
def test_a_projection_of_full_rank_loses_nothing_stays_and_gives_adam_in_its_basis(shape, identity):
    """``P^T P = 1``: no gradient has a rest. With the identity it is AdamW."""
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    short = min(rows, columns)
    P = torch.linalg.qr(torch.randn(short, short, dtype=torch.float64))[0]
    P = torch.eye(short, dtype=torch.float64) if identity else P
    p, rotated = (nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.0}
    own, adam = COAP([p], ratio=1, every=1, sketch_every=1000, **settings), torch.optim.AdamW([rotated], **settings)
    own.param_groups[0]["turn"] = 1  # behind the first sketch
    p.grad = torch.zeros_like(p)
    own._init_group(own.param_groups[0], [])
    own.state[p]["projection"].copy_(P)
    turn = lambda t: t @ P.T if rows >= columns else P @ t
    for _ in range(5):
        p.grad = torch.randn(rows, columns, dtype=torch.float64)
        rotated.grad = turn(p.grad)
        own.step()
        adam.step()
        torch.testing.assert_close(own.state[p]["projection"], P, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(turn(p.detach()), rotated.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sketch_of_a_gradient_of_low_rank_is_exact_and_has_no_slope(shape):
    """Its rows span the gradient's, whatever it was made from: ``G P^T P = G``, and ``L`` is a square around zero."""
    torch.manual_seed(0)
    rows, columns = sorted(SHAPES[shape], reverse=True)
    G = torch.randn(rows, 2, dtype=torch.float64) @ torch.randn(2, columns, dtype=torch.float64)
    P = sketch(G, torch.randn(2, columns, dtype=torch.float64))
    torch.testing.assert_close(P @ P.T, torch.eye(2, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(G @ P.T @ P, G, rtol=1e-10, atol=1e-10)
    D = slope(G, P, torch.randn(rows, 2, dtype=torch.float64), columns=False)
    torch.testing.assert_close(D, torch.zeros_like(D), rtol=0, atol=1e-10)


def test_vectors_are_adamws():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones(9, dtype=torch.float64)) for _ in range(2)]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    own, other = COAP(weights[:1], **options, **OFTEN), torch.optim.AdamW(weights[1:], **options)
    for _ in range(6):
        grad = torch.randn(9, dtype=torch.float64)
        for p, optimizer in zip(weights, (own, other), strict=True):
            p.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-10)


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [*(pytest.param(cut, marks=pytest.mark.nightly) for cut in (2, 3)), 4])
def test_resumed_before_each_kind_of_step_it_goes_on_exactly(cut):
    model, batches = build()
    step = stepper("compile_step", model, COAP(model.parameters(), lr=0.01, **OFTEN))
    for batch in batches[:cut]:
        step(*batch)
    saved = copy.deepcopy(step.state_dict())
    assert saved["optimizer"]["param_groups"][0]["turn"] == cut
    again, _ = build()
    resumed = stepper("compile_step", again, COAP(again.parameters(), lr=0.01, **OFTEN))
    resumed.load_state_dict(saved)
    for batch in batches[cut : cut + 4]:
        step(*batch)
        resumed(*batch)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_half_precision_has_wide_state():
    model, batches = build(torch.bfloat16)
    optimizer = COAP(model.parameters(), lr=0.01, **OFTEN)
    step = stepper("compile_step", model, optimizer)
    for batch in batches[:5]:
        step(*batch)
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32}
    assert all(p.dtype is torch.bfloat16 and p.isfinite().all() for p in model.parameters())


def test_behind_a_rule_the_doors_agree_in_each_kind_of_step():
    found = []
    for door in ("compile", "compile_step"):
        model, batches = build()
        step = stepper(door, model, COAP(model.parameters(), lr=0.01, **OFTEN), MKOR(factor_dtype=torch.float64))
        for batch in batches[:5]:
            step(*batch)
        found.append([p.detach() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


@pytest.mark.nightly
def test_inductor_takes_its_decompositions():
    model, batches = build(torch.float32)
    twin = copy.deepcopy(model)
    own, other = (COAP(m.parameters(), lr=0.01, **OFTEN) for m in (model, twin))
    step, plain = stepper("compile_step", model, own, backend="inductor"), stepper("eager", twin, other)
    for batch in batches[:5]:
        step(*batch)
        plain(*batch)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert step.compilations == 3
