"""The README is true: its example prints its table, its commands and files exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.M))
def test_commands_are_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_files_exist():
    named = re.findall(r"`((?:docs/)?[\w.]+\.md)`", README)
    assert len(named) >= 4 and all((ROOT / name).is_file() for name in named)


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text() and "make test" in README
