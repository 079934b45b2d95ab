"""Varying lengths: a transformer has two programs, a recurrent layer one a length, said before there are too many."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import MKOR

LAYERS = {
    "LSTM": lambda: nn.LSTM(4, 5, batch_first=True),
    "GRU": lambda: nn.GRU(4, 5, batch_first=True),
    "RNN": lambda: nn.RNN(4, 5, batch_first=True),
}


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.rnn, self.head = LAYERS[layer](), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def stepped(model, door):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch._dynamo.reset()
    if door == "compile_step":
        step = mkor_fx.compile_step(model, mse_loss, optimizer, MKOR(), backend="eager")
        return step, lambda: step.compilations
    compiled = mkor_fx.compile(model, MKOR(), backend="eager")

    def one(x, y):
        optimizer.zero_grad()
        mse_loss(compiled(x), y).backward()
        optimizer.step()

    return one, lambda: len(compiled.coverage.graphs.captured)


@pytest.mark.parametrize(
    ("layer", "door"),
    [
        ("LSTM", "compile_step"),
        pytest.param("GRU", "compile", marks=pytest.mark.nightly),
        pytest.param("RNN", "compile_step", marks=pytest.mark.nightly),
        ("RNN", "compile"),
    ],
)
@torch._dynamo.config.patch(recompile_limit=4)
def test_lengths_of_a_recurrent_layer_are_said_once(layer, door):
    one, programs = stepped(Recurrent(layer), door)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            one(torch.randn(3, 2, 4), torch.randn(3, 2))
    with pytest.warns(UserWarning, match=r"sequences of 2 lengths so far \(2, 3\): .* at 4 .*Pad or bucket .*said once"):
        one(torch.randn(3, 3, 4), torch.randn(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(torch.randn(3, 4, 4), torch.randn(3, 2))
        one(torch.randn(3, 5, 4), torch.randn(3, 2))
    assert programs() == 4
    if door == "compile_step":
        with pytest.raises(RuntimeError, match=r"recompile limit \(4 programs\).*of sequences under nn\.LSTM.*each length"):
            one(torch.randn(3, 6, 4), torch.randn(3, 2))
    else:
        with pytest.warns(UserWarning, match="does not precondition .* at its recompile limit .* pad inputs to few sizes"):
            one(torch.randn(3, 6, 4), torch.randn(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(torch.randn(3, 3, 4), torch.randn(3, 2))  # what is there goes on


@pytest.mark.parametrize("door", ["compile_step", pytest.param("compile", marks=pytest.mark.nightly)])
def test_a_transformer_has_two_programs(door):
    one, programs = stepped(transformer(), door)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (5, 7, 9, 4, 12, 16, 3, 11, 6, 13):
            one(torch.randn(3, length, 8), torch.randn(3, length, 8))
    assert programs() == 2
