"""AdaFisher against its equations, written out here without the rule."""

import pytest
import torch
from side_by_side import Directed, side_by_side, small
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import AdaFisher
from mkor_fx.rules import Gradient, Shape, Use

GAMMA, BETA, DAMPING = 0.7, 0.8, 0.05
SELDOM = [pytest.param(kind, marks=pytest.mark.nightly) for kind in ("cnn", "transformer")]


class ByHand:
    """AdaFisherW, of ``[W | b]``."""

    def __init__(self, every=1, momentum=BETA):
        self.every, self.momentum, self.h, self.s, self.m = every, momentum, {}, {}, {}

    def __call__(self, name, t, a, g, G, b):
        if b is not None:
            a, G = torch.cat([a, torch.ones_like(a[:, :1])], 1), torch.cat([G, b[:, None]], 1)
        if t % self.every == 0:
            for kept, mean in ((self.h, (a**2).mean(0)), (self.s, ((len(g) * g) ** 2).mean(0))):
                scaled = (mean - mean.min()) / (mean.max() - mean.min() + 1e-6)
                kept[name] = GAMMA * kept.get(name, torch.ones_like(mean)) + (1 - GAMMA) * scaled
        self.m[name] = self.momentum * self.m.get(name, 0) + (1 - self.momentum) * G
        D = self.m[name] / (1 - self.momentum ** (t + 1)) / (torch.outer(self.s[name], self.h[name]) + DAMPING)
        return (D, None) if b is None else (D[:, :-1], D[:, -1])


def beside(kind, door, rule, hand, **options):
    """State and reference behind some steps. Factors are float32; embeddings are SGD's."""
    reference = lambda model, optimizer: Directed(model, optimizer, hand)
    return side_by_side(small(kind), rule, door, lambda params: torch.optim.SGD(params, lr=0.02), reference, 1e-5, **options)


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("kind", ["mlp", *SELDOM])
def test_equations(kind, door):
    hand = ByHand(every=2)
    state, _ = beside(kind, door, AdaFisher(momentum=BETA, damping=DAMPING, decay=GAMMA), hand, refresh_every=2)
    for entry, kept in (("h", hand.h), ("s", hand.s)):
        for name, tensor in kept.items():
            torch.testing.assert_close(state[f"{name}.{entry}"].double(), tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("door", ["compile_step", "compile"])
def test_without_momentum_the_base_optimizer_gets_the_direction(door):
    rule = AdaFisher(momentum=0.0, damping=DAMPING, decay=GAMMA)
    assert rule.applies == "gradient"
    beside("mlp", door, rule, ByHand(momentum=0.0))


def updated(rule, a, g, times=1, bias=False):
    """The state in float64 behind ``times`` refreshes from the same rows."""
    shape = Shape(g.shape[1], a.shape[1], bias)
    state = {k: t.double() for k, t in rule.init(shape, torch.device("cpu")).items()}
    G = Gradient(g.T @ a, g.sum(0) if bias else None)
    uses = [Use(rule.summarize(shape, a, g), torch.tensor(len(a)).double(), False)]
    for t in range(times):
        state = rule.update(state, uses, G, torch.tensor(t))
    return state


def test_averages_of_rows_that_stand_still():
    """Their fixed points: ``mm`` itself of the paper's average, 0.008/0.92 of it of the released one."""
    torch.manual_seed(0)
    a, g = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    mean = (a**2).mean(0)
    scaled = (mean - mean.min()) / (mean.max() - mean.min() + 1e-6)
    paper = updated(AdaFisher(), a, g, 200)
    torch.testing.assert_close(paper["h"], scaled, rtol=1e-10, atol=1e-15)
    released = updated(AdaFisher(average="released"), a, g, 20)
    torch.testing.assert_close(released["h"], 0.008 / 0.92 * scaled, rtol=1e-10, atol=1e-15)
    fisher = torch.outer(released["s"], released["h"])
    assert fisher.max() < 7.6e-5  # beside a damping of 1e-3


def test_the_smallest_entry_is_damped_alone_and_a_bias_has_the_input_1():
    torch.manual_seed(0)
    a, g = torch.randn(20, 5).double() / 10, torch.randn(20, 3).double()
    rule = AdaFisher(momentum=0.0)
    state = updated(rule, a, g, 200, bias=True)
    G = torch.randn(3, 6).double()
    made = rule.precondition(state, Gradient(G[:, :5], G[:, 5]))
    least = int((g**2).mean(0).argmin())
    torch.testing.assert_close(made.weight[least], G[least, :5] / 1e-3, rtol=1e-10, atol=0)
    assert state["h"].argmax() == 5  # inputs are smaller than 1
    torch.testing.assert_close(made.bias, G[:, 5] / (state["s"] * state["h"][5] + 1e-3), rtol=1e-10, atol=0)


def test_momentum_of_a_constant_gradient_is_the_gradient():
    torch.manual_seed(0)
    a, g, G = torch.randn(20, 5).double(), torch.randn(20, 3).double(), torch.randn(3, 5).double()
    rule = AdaFisher()
    state = updated(rule, a, g)
    for t in range(5):
        state = rule.advance(state, Gradient(G), torch.tensor(t))
        expected = G / (torch.outer(state["s"], state["h"]) + 1e-3)
        torch.testing.assert_close(rule.precondition(state, Gradient(0 * G)).weight, expected, rtol=1e-10, atol=0)


def test_weight_decay_is_the_groups_and_decoupled():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    step = mkor_fx.compile_step(model, mse_loss, optimizer, AdaFisher(damping=1e9), backend="eager")
    step(torch.randn(8, 5).double(), torch.randn(8, 3).double())
    torch.testing.assert_close(model.weight, before * (1 - 0.1 * 0.5), rtol=1e-8, atol=0)


def test_an_embedding_is_left_to_the_base_optimizer():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, mse_loss, optimizer, AdaFisher(), backend="eager")
    step(torch.randint(0, 9, (5,)), torch.randn(5, 4))
    assert "an embedding, which AdaFisher leaves" in str(step.coverage["0.weight"].declined)
    assert {key.split(".")[0] for key in step.mkor.state_dict()} == {"1", "step"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.0}, r"AdaFisher\(damping=0\.0\): must be positive"),
        ({"decay": 1.0}, r"AdaFisher\(decay=1\.0\): the weight of the old average"),
        ({"momentum": 1.0}, r"AdaFisher\(momentum=1\.0\): must be a number in \[0, 1\)"),
        ({"average": "code"}, r"AdaFisher\(average='code'\): must be 'paper' or 'released'"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AdaFisher(**options)
