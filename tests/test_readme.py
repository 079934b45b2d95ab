"""The README is true: its example prints its table, its commands and files exist."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import torch

import mkor_fx

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:python)?\n(.*?)^```", README, re.S | re.M)


def test_the_example_prints_the_table():
    example = next(block for block in BLOCKS if "compile_step(" in block)
    table = next(block for block in BLOCKS if block.startswith("parameter"))
    assert len([line for line in example.splitlines() if line.strip()]) <= 9
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example.replace("optimizer)\n", "optimizer, backend='eager')\n"), {})
    assert printed.getvalue().rstrip() == table.rstrip()


def test_the_lines_about_looking_run():
    example = next(block for block in BLOCKS if "compile_step(" in block)
    looking = next(block for block in BLOCKS if ".inserted(" in block)
    excerpt = next(block for block in BLOCKS if block.startswith("# 4.weight"))
    namespace: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example.replace("optimizer)\n", "optimizer, backend='eager')\n"), namespace)
        exec(looking, namespace)
    operations = re.findall(r"mkor_fx\.\w+\(", printed.getvalue())
    assert set(re.findall(r"mkor_fx\.\w+\(", excerpt)) <= set(operations)


def test_the_other_lines_run_too(tmp_path, monkeypatch):
    """The page, the check before training, and the progress line, in the order of the README."""
    monkeypatch.chdir(tmp_path)
    if shutil.which("dot") is None:
        monkeypatch.setattr(mkor_fx.show.graphs.Graphs, "to_svg", lambda *arguments: None)
    example = next(block for block in BLOCKS if "compile_step(" in block)
    namespace: dict = {"loader": [(torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,)))] * 20}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as line:
        exec(example.replace("optimizer)\n", "optimizer, backend='eager')\n"), namespace)
        for mark in (".to_html(", "table(costs=True)", "mkor_fx.progress("):
            block = next(block for block in BLOCKS if mark in block)
            exec(block.replace('allow=["*.position"]', ""), namespace)
    assert (tmp_path / "report.html").is_file()
    last = line.getvalue().splitlines()[-1]
    assert last.startswith("20/20 (100%)  loss") and "40 refreshes" in last


def test_the_picture_is_there_and_small():
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert 0 < (ROOT / picture).stat().st_size < 300_000


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.M))
def test_commands_are_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_files_exist():
    named = re.findall(r"`((?:docs/)?[\w.]+\.md)`", README)
    assert len(named) >= 4 and all((ROOT / name).is_file() for name in named)


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text() and "make test" in README


def test_the_lines_about_rules_run():
    (block,) = [block for block in BLOCKS if block.startswith("rule = {")]
    namespace: dict = {"mkor_fx": mkor_fx}
    exec(block, namespace)
    attention = torch.nn.ModuleDict({"attn": torch.nn.Linear(4, 4)})
    model = torch.nn.ModuleDict({"layer": attention, "mlp": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
    model.forward = lambda x: model["head"](model["mlp"](model["layer"]["attn"](x)))
    optimizer = torch.optim.AdamW(model.parameters())
    step = mkor_fx.compile_step(model, torch.nn.functional.mse_loss, optimizer, namespace["rule"], backend="eager")
    for _ in range(2):
        step(torch.randn(8, 4), torch.randn(8, 2))
    held = {key.rpartition(".")[0] for key in step.mkor.state_dict()}
    assert held == {"layer.attn.weight", "mlp.weight", ""} and "layer.attn.weight.L_inverse" in step.mkor.state_dict()
