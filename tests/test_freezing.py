"""Weights frozen and thawed while a run goes on: one message and one compilation each, the trajectory of the plain loop."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR

RULES = {"none": None, "mkor": MKOR(factor_dtype=torch.float64), "kfac": KFAC(derive_every=2)}
#: of each part of the run: what is frozen, and what is said
PARTS = [
    ((), None),
    ((0,), r"0\.bias, 0\.weight are frozen now .* Sequential is compiled once more .* going back compiles nothing"),
    ((), None),
    ((0,), None),
    ((0, 2), r"2\.bias, 2\.weight are frozen now"),
    ((2,), r"0\.bias, 0\.weight are trained now"),
]


def build():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def freeze(model, layers):
    for number in (0, 2, 4):
        model[number].requires_grad_(number not in layers)


def train(model, one, silent):
    """The run in parts: weights at the end of each; of each part what was said."""
    found, said = [], []
    torch.manual_seed(1)
    for layers, _ in PARTS:
        freeze(model, layers)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                one(torch.randn(8, 6).double(), torch.randn(8, 3).double())
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
        said.append([str(w.message) for w in caught if "mkor_fx" in str(w.message)])
    if not silent:
        for messages, (_, expected) in zip(said, PARTS, strict=True):
            assert len(messages) == (expected is not None), messages
            assert expected is None or re.search(expected, messages[0]), messages
    return found


def in_a_loop(rule):
    model, optimizer = build()
    called = model if rule is None else mkor_fx.compile(model, rule, backend="eager")

    def one(x, y):
        optimizer.zero_grad()
        mse_loss(called(x), y).backward()
        optimizer.step()

    return train(model, one, silent=rule is None), called


@pytest.mark.parametrize("name", RULES)
def test_a_compiled_step_goes_where_a_loop_does(name):
    model, optimizer = build()
    step = mkor_fx.compile_step(model, mse_loss, optimizer, RULES[name], backend="eager")
    found, (expected, _) = train(model, step, silent=False), in_a_loop(RULES[name])
    for own, other in zip(found, expected, strict=True):
        for key, tensor in own.items():
            torch.testing.assert_close(tensor, other[key], rtol=1e-10, atol=1e-10)
    assert all(torch.equal(found[3][key], found[4][key]) == key.startswith(("0", "2")) for key in found[3])
    assert step.compilations == 4
    assert [entry.name for entry in step.coverage] == ["0.weight", "0.bias", "4.weight", "4.bias"]


def test_the_report_is_of_what_is_trained_now():
    _, called = in_a_loop(RULES["mkor"])
    assert [entry.name for entry in called.coverage] == ["0.weight", "0.bias", "4.weight", "4.bias"]
    freeze(called, ())
    assert len([*called.coverage]) == 6 and "6 trainable parameters" in str(called.coverage)
