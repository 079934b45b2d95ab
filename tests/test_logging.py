"""What the environment can ask for: log lines, torch's trace log, dumped stages. Each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch, mkor_fx
from torch import nn
model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if {step}:
    step = mkor_fx.compile_step(model, nn.functional.mse_loss, optimizer, mkor_fx.MKOR.published(), backend="eager")
    step(torch.randn(7, 6), torch.randn(7, 4))
else:
    compiled = mkor_fx.compile(model, mkor_fx.MKOR.published(), backend="eager")
    compiled(torch.randn(7, 6)).sum().backward()
    optimizer.step()
"""


def run(step=True, **environment):
    """Standard error of a small training program."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "TORCH_TRACE", "MKOR_FX_DUMP")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(step=step)],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


def test_torch_logs_prints_matches_and_declines():
    status, lines = run(TORCH_LOGS="+mkor_fx")
    assert status == 0
    for role in ("0.weight (5, 6): site", "0.bias (5,): bias", "1.weight (5,): a vector, and not the bias"):
        assert role in lines, role
    assert re.search(r"Sequential: refresh step: lower: \d+ nodes, \d+ ms", lines)


def test_torch_logs_without_plus_prints_stages_only():
    status, lines = run(TORCH_LOGS="mkor_fx")
    assert status == 0 and "refresh step: match" in lines and "0.weight" not in lines


@pytest.mark.parametrize("environment", [{}, {"TORCH_LOGS": "recompiles"}])
def test_nothing_is_printed_unasked(environment):
    assert run(**environment) == (0, "")


# ---- torch's trace log ----------------------------------------------------------------------------------------------


def artifacts(folder):
    """``(name, compile id or None) -> payload`` of the library's artifacts in a trace log."""
    found = {}
    for file in folder.iterdir():
        lines = file.read_text().splitlines()
        for i, line in enumerate(lines):
            start = line.find("{")
            entry = json.loads(line[start:]) if start > 0 and not line.startswith("\t") else {}
            name = entry.get("artifact", {}).get("name", "")
            if name.startswith("mkor_fx"):
                payload = []
                for following in lines[i + 1 :]:
                    if not following.startswith("\t"):
                        break
                    payload.append(following[1:])
                found[name, entry.get("frame_id")] = "\n".join(payload)
    return found


@pytest.mark.parametrize("step", [True, False], ids=["compile_step", "compile"])
def test_stages_and_coverage_are_trace_artifacts(tmp_path, step):
    status, errors = run(step=step, TORCH_TRACE=tmp_path)
    assert status == 0, errors
    found = artifacts(tmp_path)
    stages = ["00_capture", "01_canonicalize", "02_match", "03_rewrite", "04_schedule", "05_lower"]
    assert {f"mkor_fx_{stage}" for stage in stages} <= {name for name, frame in found if frame is not None}
    (rewrite,) = (text for (name, frame), text in found.items() if name == "mkor_fx_03_rewrite" and frame is not None)
    assert "mkor_fx.column_sum" in rewrite
    ((frame, coverage),) = ((frame, text) for (name, frame), text in found.items() if name == "mkor_fx_coverage")
    assert frame is not None
    entries = {entry["name"]: entry for entry in json.loads(coverage)["parameters"]}
    assert entries["0.weight"]["op"] == "linear" and entries["1.weight"]["declined"]


# ---- dumps ----------------------------------------------------------------------------------------------------------


def test_dump_writes_each_stage_and_pass(tmp_path):
    status, errors = run(MKOR_FX_DUMP=tmp_path / "dump")
    assert status == 0, errors
    (folder,) = (tmp_path / "dump").iterdir()
    assert folder.name == "000_Sequential_refresh_step"
    text = {path.name: path.read_text() for path in folder.iterdir()}
    for stage in ("00_capture", "01_canonicalize", "02_match", "03_rewrite", "04_schedule", "05_lower"):
        assert {f"{stage}.before.py", f"{stage}.after.py"} <= text.keys()
    passes = [name for name in text if name.startswith("05_lower.") and name.count(".") == 3]
    assert sorted(passes) == [
        f"05_lower.{i}_{name}.{when}.py"
        for i, name in enumerate(["order_products", "shortcut_row_sums", "expand", "unpack", "share", "store_scalars"])
        for when in ("after", "before")
    ]
    assert "mkor_fx.precondition" not in text["03_rewrite.before.py"]
    assert "mkor_fx.precondition" in text["03_rewrite.after.py"] == text["04_schedule.before.py"]
    assert "mkor_fx.precondition" in text["05_lower.2_expand.before.py"]
    assert "mkor_fx.precondition" not in text["05_lower.2_expand.after.py"]


def dump(rank, size, folder):
    os.environ["MKOR_FX_DUMP"] = folder
    torch.distributed.destroy_process_group()
    exec(PROGRAM.format(step=False), {})


def test_programs_are_numbered_across_processes(tmp_path):
    for _ in range(2):
        processes.values(dump, 1, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_Sequential_graph_0_forward_and_backward",
        "001_Sequential_update_of_2_weights",
        "002_Sequential_graph_0_forward_and_backward",
        "003_Sequential_update_of_2_weights",
    ]


def test_a_dump_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    status, errors = run(MKOR_FX_DUMP=tmp_path / "file")
    assert status != 0
    last = errors.strip().splitlines()[-1]
    assert (
        last.startswith("ValueError: MKOR_FX_DUMP=") and str(tmp_path / "file") in last and "unset the variable" in last
    )
