"""Long work shows itself in a terminal, and nowhere else."""

import io
import re
import time

import pytest
import torch
from torch import nn

import mkor_fx
from mkor_fx.show import waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(waiting, "BEFORE_IT_SHOWS", 0.01)
    monkeypatch.setattr(waiting, "BETWEEN", 0.01)


def test_a_wait_is_counted_and_its_line_is_gone_in_the_end():
    terminal = Terminal()
    with pytest.raises(KeyError), waiting.shown("compiling", terminal):
        time.sleep(0.1)
        raise KeyError
    said = terminal.getvalue()
    assert re.match(r"\r\x1b\[Kmkor_fx: compiling, 0 s\r", said) and said.endswith("\r\x1b[K")
    after = len(said)
    time.sleep(0.05)
    assert len(terminal.getvalue()) == after


def test_what_is_quick_or_no_terminal_says_nothing(monkeypatch):
    monkeypatch.setattr(waiting, "BEFORE_IT_SHOWS", 9.0)
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with waiting.shown("compiling", stream):
            pass
        assert stream.getvalue() == ""
    monkeypatch.setattr("sys.stderr", None)
    with waiting.shown("compiling"):
        pass


@pytest.mark.parametrize("door", ["compile", "compile_step"])
def test_both_doors_say_which_program(door, monkeypatch):
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    if door == "compile":
        compiled = mkor_fx.compile(model, backend="eager")
        compiled(x).square().mean().backward()
        optimizer.step()
        expected = ["graph 0 of Sequential", "the update of 1 weights of Sequential", "the apply of 1 weights of Sequential"]
    else:
        mkor_fx.compile_step(model, nn.functional.mse_loss, optimizer, backend="eager")(x, torch.randn(4, 3))
        expected = ["the refresh program of Sequential"]
    said = dict.fromkeys(re.findall(r"mkor_fx: compiling (.*?), \d+ s", terminal.getvalue()))
    assert [*said] == expected
