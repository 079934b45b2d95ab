"""SMMF, Adalayer and H-Fac: in closed form, beside independent references, alone and in both doors; what COAP shares."""

import copy
import math

import numpy as np
import pytest
import stepping
import torch
from torch import nn
from torch.nn import functional

from mkor_fx import MKOR
from mkor_fx.optim import COAP, SMMF, Adalayer, HFac
from mkor_fx.runtime.optimizer_state import initialise_state
from mkor_fx.runtime.optimizers import Optimizers

# ---- references: numpy, one tensor; ``s`` is its state, ``o`` the options --------------------------------------------


def smmf(p, g, s, t, o):
    b = max(d for d in range(1, math.isqrt(p.size) + 1) if p.size % d == 0)
    G = g.reshape(-1, b)
    b2 = 1 - t ** o["decay"]
    V = b2 * s.get("V", 0) + (1 - b2) * G**2
    s["V"] = np.outer(V.sum(1), V.sum(0)) / (V.sum() or 1)
    M = G
    if o["beta"] is not None:
        b1 = o["beta"] * o["growth"] ** (t - 1)
        M = b1 * s.get("M", 0) + (1 - b1) * G
        A = np.abs(M)
        s["M"] = np.where(M > 0, 1, -1) * np.outer(A.sum(1), A.sum(0)) / (A.sum() or 1)
    return (1 - o["lr"] * o["weight_decay"]) * p - o["lr"] * (M / (np.sqrt(V) + o["eps"])).reshape(p.shape)


def adalayer(p, g, s, t, o):
    b1, b2 = o["betas"]
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    count = (p.shape[0] if p.ndim else 1) if o["blocks"] == "rows" else o["blocks"]
    means = [np.mean(part**2) for part in np.split(g, count)]
    s["v"] = [b2 * v + (1 - b2) * new for v, new in zip(s.get("v", [0] * count), means, strict=True)]
    parts = [m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + o["eps"])
             for m, v in zip(np.split(s["m"], count), s["v"], strict=True)]  # fmt: skip
    return (1 - o["lr"] * o["weight_decay"]) * p - o["lr"] * np.concatenate(parts)


def hfac(p, g, s, t, o):
    c1, c2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in o["betas"])
    average = lambda key, new, c: s.__setitem__(key, c * s.get(key, 0) + (1 - c) * new)
    if p.ndim < 2:
        average("m", g, c1)
        average("v", g**2 + o["eps"], c2)
        D = s["m"] / np.sqrt(s["v"])
    else:
        G = g.reshape(len(g), -1)
        m, n = G.shape
        average("u", G.sum(1) / n, c1)
        average("w", G.sum(0) / m, c1)
        average("r", (G**2 + o["eps"]).sum(1), c2)
        average("s", (G**2 + o["eps"]).sum(0), c2)
        U = G / np.sqrt(np.outer(s["r"], s["s"]) / s["r"].sum())
        U = U / max(1, np.sqrt(np.mean(U**2)) / o["threshold"])
        phi = c1 * (s["u"] - G.mean(1)) / np.sqrt(s["r"] / n)
        psi = c1 * (s["w"] - G.mean(0)) / np.sqrt(s["s"] / m)
        D = (U + (phi[:, None] + psi[None, :]) / 2).reshape(p.shape)
    return p - o["lr"] * (D + o["weight_decay"] * p)


CASES = {
    "SMMF": (SMMF, smmf, {}),
    "SMMF, decay": (SMMF, smmf, {"weight_decay": 0.1, "decay": -0.8, "growth": 0.9}),
    "SMMF, no momentum": (SMMF, smmf, {"beta": None}),
    "Adalayer": (Adalayer, adalayer, {}),
    "Adalayer, rows": (Adalayer, adalayer, {"blocks": "rows", "weight_decay": 0.1}),
    "Adalayer, halves": (Adalayer, adalayer, {"blocks": 2, "betas": (0.8, 0.9)}),
    "HFac": (HFac, hfac, {}),
    "HFac, decay": (HFac, hfac, {"weight_decay": 0.1, "betas": (0.8, 0.9), "threshold": 0.5}),
}
CLASSES = {"SMMF": SMMF, "Adalayer": Adalayer, "HFac": HFac, "COAP": COAP}


def build(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)
    model = nn.Sequential(*layers).to(dtype)
    return model, [(torch.randn(8, 2, 3, 3, dtype=dtype), torch.randint(4, (8,))) for _ in range(8)]


def stepper(door, model, optimizer, rule=None, backend="eager"):
    return stepping.stepper(door, model, functional.cross_entropy, optimizer, rule, backend)[1]


def constant(make, grad, steps=4, **options):
    """What each step at one gradient does, from weights of zero; ``lr`` 1."""
    p = nn.Parameter(torch.zeros_like(grad))
    optimizer = make([p], lr=1.0, **options)
    moved = []
    for _ in range(steps):
        before, p.grad = p.detach().clone(), grad.clone()
        optimizer.step()
        moved.append(p.detach() - before)
    return moved


# ---- closed forms ----------------------------------------------------------------------------------------------------


def rank_one(rows, columns):
    torch.manual_seed(0)
    sides = [torch.rand(size, dtype=torch.float64) + 0.5 for size in (rows, columns)]
    return torch.outer(*sides) * torch.randn(rows, columns).sign()


@pytest.mark.parametrize("shape", [(6, 4), (24,), (2, 3, 4), (7,)])
def test_smmf_on_a_factored_gradient_is_the_sign_at_the_size_of_its_momentum(shape):
    """The factorization is exact, in the squarest view that the tensor has."""
    grad = rank_one(*((6, 4) if math.prod(shape) == 24 else (7, 1))).reshape(shape)
    old = 1.0
    for t, moved in enumerate(constant(SMMF, grad, eps=0.0), start=1):
        old *= 0.9 * 0.999 ** (t - 1)
        torch.testing.assert_close(moved, -(1 - old) * grad.sign(), rtol=1e-10, atol=1e-10)


def test_adalayer_at_one_gradient_divides_it_by_the_root_mean_square_of_its_block():
    grad = torch.randn(6, 4, dtype=torch.float64)
    rows = grad.square().mean(1, keepdim=True).sqrt()
    halves = grad.reshape(2, -1).square().mean(1).sqrt().repeat_interleave(3)[:, None]
    for blocks, root in ((1, grad.square().mean().sqrt()), ("rows", rows), (2, halves)):
        for moved in constant(Adalayer, grad, blocks=blocks):
            torch.testing.assert_close(moved, -grad / root, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 2), (24,)])
def test_hfac_on_a_factored_gradient_is_the_sign(shape):
    """Its averages are those of the gradient from the first step on, and what is added for the difference is nothing."""
    grad = rank_one(6, 4).reshape(shape)
    for moved in constant(HFac, grad):
        torch.testing.assert_close(moved, -grad.sign(), rtol=1e-10, atol=1e-10)


def test_adalayer_with_a_block_an_element_is_adamw():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(9, 1, dtype=torch.float64)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    own, other = Adalayer(weights[:1], blocks="rows", **options), torch.optim.AdamW(weights[1:], **options)
    for _ in range(6):
        grad = torch.randn(9, 1, dtype=torch.float64)
        for p, optimizer in zip(weights, (own, other), strict=True):
            p.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-10)


# ---- beside the references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["eager", "compile_step"])
@pytest.mark.parametrize("name", CASES)
def test_beside_the_reference(name, door):
    make, reference, options = CASES[name]
    model, batches = build()
    twin = copy.deepcopy(model)
    optimizer = make(model.parameters(), lr=0.01, **options)
    step, states = stepper(door, model, optimizer), [{} for _ in twin.parameters()]
    for t, (x, y) in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = 0.02 / t
        grads = torch.autograd.grad(functional.cross_entropy(twin(x), y), list(twin.parameters()))
        for q, g, state in zip(twin.parameters(), grads, states, strict=True):
            new = reference(q.detach().numpy(), g.numpy(), state, t, optimizer.param_groups[0])
            q.data.copy_(torch.from_numpy(new))
        step(x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    if door == "compile_step":
        assert step.compilations == 1


@pytest.mark.parametrize("name", CLASSES)
def test_behind_a_rule_the_doors_agree(name):
    found = []
    for door in ("compile", "compile_step"):
        model, batches = build()
        step = stepper(door, model, CLASSES[name](model.parameters(), lr=0.01), MKOR(factor_dtype=torch.float64))
        for batch in batches[:4]:
            step(*batch)
        found.append([p.detach() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


@pytest.mark.nightly
def test_inductor_takes_bits_of_signs():
    model, batches = build(torch.float32)
    twin = copy.deepcopy(model)
    own, other = SMMF(model.parameters(), lr=0.01), SMMF(twin.parameters(), lr=0.01)
    step, plain = stepper("compile_step", model, own, backend="inductor"), stepper("eager", twin, other)
    for batch in batches[:4]:
        step(*batch)
        plain(*batch)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert step.compilations == 1


# ---- state -----------------------------------------------------------------------------------------------------------

#: elements of float32 and bytes beside them, of a matrix of 48 x 32 and a vector of 10
SIZES = {
    "SMMF": (2 * (48 + 32) + 2 * (5 + 2), 192 + 2), "Adalayer": (48 * 32 + 1 + 10 + 1, 0), "HFac": (2 * (48 + 32) + 20, 0),
    "COAP": (2 * 48 * 16 + 16 * 32 + 20, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_the_size_of_the_state(name):
    params = [nn.Parameter(torch.zeros(48, 32)), nn.Parameter(torch.zeros(10))]
    optimizer = CLASSES[name](params)
    initialise_state(Optimizers.of(optimizer), params)
    tensors = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    floats = sum(t.numel() for t in tensors if t.dtype is torch.float32)
    assert (floats, sum(t.numel() for t in tensors if t.dtype is torch.uint8)) == SIZES[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_state_goes_round(name, dtype):
    model, batches = build(dtype)
    optimizer = CLASSES[name](model.parameters(), lr=0.01)
    step = stepper("eager", model, optimizer)
    for batch in batches[:4]:
        step(*batch)
    again = copy.deepcopy(model)
    other = CLASSES[name](again.parameters(), lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key, tensor in optimizer.state[p].items():
            assert other.state[q][key].dtype == tensor.dtype and torch.equal(other.state[q][key], tensor)
    resumed = stepper("compile_step" if dtype is torch.float64 else "eager", again, other)
    for batch in batches[4:]:
        step(*batch)
        resumed(*batch)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CLASSES)
def test_no_gradient_is_no_step(name):
    """Zeros are divided by nothing that is zero."""
    for moved in constant(CLASSES[name], torch.zeros(4, 6)):
        assert not moved.any()


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        *((make, {"lr": -1.0}, rf"{name}\(lr=-1\.0\): must not be negative") for name, make in CLASSES.items()),
        *((make, {"eps": -1.0}, rf"{name}\(eps=-1\.0\): must not be negative") for name, make in CLASSES.items()),
        (Adalayer, {"betas": (0.9, 1.0)}, r"Adalayer\(betas=\(0\.9, 1\.0\)\): .*must lie in \[0, 1\)"),
        (Adalayer, {"blocks": 4}, r"Adalayer\(blocks=4\): must be 'rows' or a number that divides .*\[6, 2\] is 6"),
        (Adalayer, {"blocks": "columns"}, r"Adalayer\(blocks='columns'\): must be 'rows'"),
        (HFac, {"threshold": 0.0}, r"HFac\(threshold=0\.0\): a root mean square above 0"),
        (COAP, {"ratio": 0.5}, r"COAP\(ratio=0\.5\): of a matrix's shorter side"),
        (COAP, {"every": 0}, r"COAP\(every=0\): must be an integer, 1 or more"),
        (COAP, {"sketch_every": 2.0}, r"COAP\(sketch_every=2\.0\): must be an integer"),
        (COAP, {"scale": 0.0}, r"COAP\(scale=0\.0\): must be positive"),
        (SMMF, {"beta": 1.0}, r"SMMF\(beta=1\.0\): .*or None for no momentum"),
        (SMMF, {"decay": 0.5}, r"SMMF\(decay=0\.5\): an exponent"),
        (SMMF, {"growth": 0.0}, r"SMMF\(growth=0\.0\): a factor in \(0, 1\]"),
    ],
)
def test_bad_options_are_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        make([nn.Parameter(torch.ones(6, 2))], **options)


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_that_are_not_taken_are_named_and_closures_called(name):
    p = nn.Parameter(torch.ones(3))
    optimizer = CLASSES[name]([p])
    assert optimizer.step(lambda: "loss") == "loss"
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=rf"{name} takes no sparse gradients: use torch\.optim\.SparseAdam"):
        optimizer.step()
    q = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match=rf"{name} takes no complex parameters"):
        CLASSES[name]([q]).step()
