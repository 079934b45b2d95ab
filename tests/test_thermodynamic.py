"""Thermodynamic K-FAC against its equations, written out here without the rule."""

import hashed
import pytest
import torch
from side_by_side import Directed, side_by_side, small
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, ThermodynamicKFAC

DECAY, DAMPING = 0.8, 0.05


def spd(size, least=0.1, largest=1.0):
    """And its eigenvectors and eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    m = torch.linspace(least, largest, size, dtype=torch.float64)
    return Q @ m.diag() @ Q.T, Q, m


def run_of(number):
    return torch.tensor(number)


class ByHand:
    """Inverses are used from the step behind the one that made them."""

    def __init__(self, every, steps, burn_in, h, temperature=0.0, bits=None, rounding="nearest"):
        vars(self).update(locals(), factors={}, inverses={}, run=0)

    def __call__(self, name, t, a, g, G, b):
        new, old = {"L": len(g) * g.T @ g, "R": a.T @ a / len(a)}, self.factors.get(name)
        self.factors[name] = {k: v if old is None else DECAY * old[k] + (1 - DECAY) * v for k, v in new.items()}
        if name not in self.inverses:
            return G, b
        L, R = self.inverses[name]
        made = [(L @ G @ R, G)] + ([] if b is None else [(L @ b, b)])
        sized = [D * (raw.norm() / D.norm()) for D, raw in made]
        return (*sized, None)[:2]

    def derive(self, t):
        if t % self.every:
            return
        for name, factors in self.factors.items():
            pi = ((factors["R"].trace() / len(factors["R"])) / (factors["L"].trace() / len(factors["L"]))) ** 0.5
            added, last = {"L": DAMPING**0.5 / pi, "R": DAMPING**0.5 * pi}, self.inverses.get(name, (0, 0))
            self.inverses[name] = [self.inverse(factors[k] + added[k] * torch.eye(len(factors[k])).double(), last[i], i)
                                   for i, k in enumerate("LR")]  # fmt: skip
        self.run += 1

    def inverse(self, M, last, i):
        M = self.quantised(M, i)
        bound = min(M.abs().sum(1).max(), M.norm())
        X, kept = last * bound * torch.ones_like(M), []
        for k in range(self.steps):
            X = X - self.h * (M / bound @ X - torch.eye(len(M)).double())
            noise = hashed.normals(self.run, 2 * k + i, M.numel()).view_as(M)
            X = X + (2 * self.temperature * self.h) ** 0.5 * noise
            kept.append(X)
        mean = self.quantised(torch.stack(kept[self.burn_in :]).mean(0), i + 2) / bound
        return (mean + mean.T) / 2

    def quantised(self, x, i):
        if self.bits is None:
            return x
        q = x.abs().max() / (2 ** (self.bits - 1) - 1)
        up = torch.triu(hashed.uniforms(self.run, 4 * self.steps + i, x.numel()).view_as(x))
        return q * torch.floor(x / q + (up + up.T - torch.diag(up.diagonal()) if self.rounding == "stochastic" else 0.5))


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize(("kind", "every", "options"), [
    ("mlp", 1, {}), ("mlp", 2, {"temperature": 1e-3}),
    *(pytest.param(kind, 2, {"temperature": 1e-3}, marks=pytest.mark.nightly) for kind in ("cnn", "transformer")),
])  # fmt: skip
def test_equations(kind, door, every, options):
    hand = ByHand(every, steps=30, burn_in=10, h=0.9, **options)
    rule = ThermodynamicKFAC(decay=DECAY, damping=DAMPING, derive_every=every, steps=30, burn_in=10, time_step=0.9,
                             **{"temperature": 0.0, **options})  # fmt: skip
    reference = lambda model, optimizer: Directed(model, optimizer, hand, hand.derive)
    sgd, skip = lambda params: torch.optim.SGD(params, lr=0.1), ["embed.*"] if kind == "transformer" else []
    state, _ = side_by_side(small(kind), rule, door, sgd, reference, 1e-3, skip=skip)
    name = next(iter(hand.inverses))
    assert int(state[f"{name}.runs"]) == hand.run
    torch.testing.assert_close(state[f"{name}.L_inverse"].double(), hand.inverses[name][0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_run_with_noise_and_few_bits(rounding):
    """In float64, where a quantum is not a coin's toss."""
    M = spd(6)[0]
    hand = ByHand(1, steps=20, burn_in=5, h=0.7, temperature=1e-3, bits=8, rounding=rounding)
    rule = ThermodynamicKFAC(steps=20, burn_in=5, time_step=0.7, temperature=1e-3, bits=8, rounding=rounding)
    for hand.run in (0, 3):
        last = torch.zeros(6, 6).double() if hand.run == 0 else 2 * torch.eye(6).double()
        found = rule.measured(M, last, run_of(hand.run), 1)
        torch.testing.assert_close(found, hand.inverse(M, last, 1), rtol=1e-10, atol=1e-12)
        assert (found @ M - torch.eye(6)).norm() < 1


@pytest.mark.parametrize("h", [0.3, 1.0, 1.9])
def test_without_noise_it_is_richardsons_iteration(h):
    M, Q, m = spd(7)
    options = {"temperature": 0.0, "time_step": h, "steps": 25}
    last = ThermodynamicKFAC(burn_in=24, **options).relaxed(M, torch.zeros_like(M), run_of(0), 0)
    torch.testing.assert_close(last, Q @ ((1 - (1 - h * m) ** 25) / m).diag() @ Q.T, rtol=1e-10, atol=1e-12)
    mean = ThermodynamicKFAC(burn_in=5, **options).relaxed(M, torch.zeros_like(M), run_of(0), 0)
    powers = torch.stack([(1 - (1 - h * m) ** k) / m for k in range(6, 26)]).mean(0)
    torch.testing.assert_close(mean, Q @ powers.diag() @ Q.T, rtol=1e-10, atol=1e-12)
    enough = ThermodynamicKFAC(temperature=0.0, time_step=h, steps=2000, burn_in=1999)
    torch.testing.assert_close(enough.measured(5 * M, M, run_of(1), 0), (5 * M).inverse(), rtol=1e-10, atol=1e-12)


def test_a_warm_start_catches_up():
    M = spd(7, least=1e-3)[0]
    rule, error = ThermodynamicKFAC(temperature=0.0, steps=200, burn_in=100), []
    inverse = torch.eye(7).double()
    for run in range(40):
        inverse = rule.measured(M, inverse, run_of(run), 0)
        error.append(float((M @ inverse - torch.eye(7)).norm()))
    assert error[0] > 0.5 and error[-1] < 0.02 and error == sorted(error, reverse=True)
    cold = ThermodynamicKFAC(temperature=0.0, steps=200, burn_in=100, warm_start=False)
    torch.testing.assert_close(cold.measured(M, inverse, run_of(3), 0), rule.measured(M, inverse, run_of(0), 0))


def test_noise_leaves_the_variances_that_it_should():
    """Of the last ``X`` that of the process with ``h``, ``T / m / (1 - h m / 2)``; of the mean ``2 T / (m^2 h n)``."""
    m = torch.linspace(0.3, 1, 16).double()
    T, h, start = 1e-2, 0.5, (1 / m).diag()
    last = ThermodynamicKFAC(temperature=T, time_step=h, steps=40, burn_in=39)
    mean = ThermodynamicKFAC(temperature=T, time_step=h, steps=200, burn_in=20)
    for rule, runs, expected in ((last, 40, T / m / (1 - h * m / 2)), (mean, 12, 2 * T / (m**2 * h * 180))):
        found = torch.stack([rule.relaxed(m.diag(), start, run_of(i), 0) for i in range(runs)]) - start
        ratio = found.square().mean((0, 2)) / expected
        assert abs(ratio.mean() - 1) < 0.12 and 0.5 < ratio.min() < ratio.max() < 1.5
        assert abs(found.mean()) < 0.01


def test_quantisation():
    x = spd(9)[0]
    nearest, drawn = (ThermodynamicKFAC(bits=4, rounding=how) for how in ("nearest", "stochastic"))
    quantum = float(x.abs().max()) / 7
    found = nearest._quantised(x, run_of(0), 0)
    assert (found - x).abs().max() <= quantum / 2 + 1e-12 and len((found / quantum).round().unique()) <= 15
    torch.testing.assert_close(found / quantum, (found / quantum).round())
    many = torch.stack([drawn._quantised(x, run_of(i), 0) for i in range(2000)])
    assert torch.equal(many, many.mT) and (many - x).abs().max() < quantum
    assert (many.mean(0) - x).abs().max() < 5 * quantum / 2 / 2000**0.5


def trained(rule):
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    step = mkor_fx.compile_step(model, mse_loss, torch.optim.SGD(model.parameters(), lr=0.05), rule, backend="eager")
    for _ in range(5):
        step(torch.randn(16, 6).double(), torch.randn(16, 4).double())
    return model, step.mkor.state_dict()


def test_long_runs_without_noise_are_k_fac():
    options = {"derive_every": 1, "damping": 0.1}
    model, state = trained(ThermodynamicKFAC(temperature=0.0, steps=400, burn_in=300, **options))
    twin, expected = trained(KFAC(**options))
    for name in ("L", "R", "L_inverse", "R_inverse"):
        torch.testing.assert_close(state[f"weight.{name}"], expected[f"weight.{name}"], rtol=1e-3, atol=1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_run_that_diverges_leaves_the_inverses_alone():
    rule = ThermodynamicKFAC(derive_every=1)
    state = rule.init(mkor_fx.rules.Shape(3, 4), torch.device("cpu"))
    state |= {"L": -1e9 * torch.eye(3), "R": spd(4)[0].float(), "seen": torch.ones(())}
    made = rule.derive(state)
    assert torch.equal(made["L_inverse"], state["L_inverse"]) and not torch.equal(made["R_inverse"], state["R_inverse"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.0}, r"ThermodynamicKFAC\(damping=0\.0\): must be positive"),
        ({"decay": 1.0}, r"ThermodynamicKFAC\(decay=1\.0\): the weight of the old average"),
        ({"steps": 0}, r"ThermodynamicKFAC\(steps=0\): must be an integer of at least 1"),
        ({"steps": 10}, r"ThermodynamicKFAC\(burn_in=100, steps=10\): leaves no step to average"),
        ({"temperature": -1.0}, r"ThermodynamicKFAC\(temperature=-1\.0\): must be 0 \(no noise\) or more"),
        ({"time_step": 2.0}, r"ThermodynamicKFAC\(time_step=2\.0\): must lie in \(0, 2\)"),
        ({"bits": 1}, r"ThermodynamicKFAC\(bits=1\): must be an integer of at least 2"),
        ({"rounding": "up"}, r"ThermodynamicKFAC\(rounding='up'\): must be 'nearest' or 'stochastic'"),
        ({"max_factor": 1.5}, r"ThermodynamicKFAC\(max_factor=1\.5\): must be an integer"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ThermodynamicKFAC(**options)
