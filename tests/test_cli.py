"""`python -m mkor_fx explain module:function`, as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mkor_fx.__main__ import main

ROOT = Path(__file__).parents[1]
MODELS = """
import torch
from torch import nn

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.lone = nn.Parameter(torch.randn(4, 6))
    def forward(self, ids):
        return self.head(self.table(ids)) + self.lone.sum()

def small():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), torch.randn(7, 6)

def with_loss():
    return nn.Linear(6, 5), (torch.randn(7, 6), torch.randn(7, 5)), nn.functional.mse_loss

def gap():
    return Table(), torch.randint(0, 5, (7,))

def wrong():
    return nn.Linear(6, 5)

def wrong_loss():
    return nn.Linear(6, 5), torch.randn(7, 6), "mse"

number = 3
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command line in a folder with ``models.py``: ``(status, output, errors)``."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models", raising=False)

    def run(*arguments):
        status = main(["explain", *arguments])
        return (status, *capsys.readouterr())

    return run


def test_from_a_shell(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "mkor_fx", "explain", "models:small", "--html", "report.html"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout and "1 of 4 trainable parameters" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_table_costs_and_json(call):
    status, table, _ = call("models:small")
    assert status == 0 and "refresh flops" not in table
    assert "refresh flops" in call("models:small", "--costs")[1]
    data = json.loads(call("models:small", "--json")[1])
    assert [p["name"] for p in data["parameters"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_loss_function_takes_the_target(call):
    status, output, _ = call("models:with_loss")
    assert status == 0 and "1 of 2 trainable parameters" in output


def test_assert_full(call):
    assert call("models:small", "--assert-full")[0] == 0
    status, output, errors = call("models:gap", "--assert-full")
    assert status == 1 and "lone 4x6: " in errors and "head.weight" in output
    gaps = [line.split()[0] for line in errors.splitlines() if line.startswith("  ")]
    allowed = [argument for name in gaps for argument in ("--allow", name)]
    assert call("models:gap", "--assert-full", *allowed)[0] == 0
    status, _, errors = call("models:gap", "--assert-full", *allowed, "--allow", "head.*")
    assert status == 1 and "'head.*'" in errors


def test_skip(call):
    assert "skipped by pattern" in call("models:small", "--skip", "0.*")[1]


@pytest.mark.parametrize(
    "target, message",
    [
        ("models", "expected module:function"),
        ("nowhere:small", "no module 'nowhere'"),
        ("models:nothing", "has no function 'nothing'"),
        ("models:number", "has no function 'number'"),
        ("models:wrong", "returned a Linear: expected (model, batch)"),
        ("models:wrong_loss", "returned a str as loss_fn"),
    ],
)
def test_wrong_targets(call, target, message):
    status, output, errors = call(target)
    assert status == 2 and output == "" and message in errors


def test_a_module_that_cannot_be_imported_shows_its_own_error(call):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        call("broken:small")


def test_an_unwritable_page_is_an_error(call):
    status, _, errors = call("models:small", "--html", "no/such/folder/report.html")
    assert status == 2 and "no/such/folder" in errors


def test_usage(call, capsys):
    with pytest.raises(SystemExit):
        call("--help")
    assert "returns (model, batch)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("models:small", "--allow", "x")
    assert "--allow belongs to --assert-full" in capsys.readouterr().err
