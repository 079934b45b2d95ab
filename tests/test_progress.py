"""Metrics on request, and the live line that reads them."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mkor_fx
from mkor_fx import MKOR

X, Y = torch.randn(7, 6), torch.randn(7, 4)


def make_step(**options):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mkor_fx.compile_step(model, F.mse_loss, optimizer, backend="eager", **{"rule": MKOR.published(), **options})


def test_metrics_of_a_step():
    step = make_step(refresh_every=2)
    assert step.metrics() == {"skipped": 0, "steps": 0, "refreshes": 0}
    for _ in range(3):
        loss = step(X, Y)
    metrics = step.metrics(per_factor=True)
    assert all(type(value) in (int, float) for value in metrics.values())
    assert metrics["loss"] == float(loss) and metrics["steps"] == 3 and metrics["refreshes"] == 2
    factors = {k: t for k, t in step.mkor.state_dict().items() if t.dim() == 2}
    assert len(factors) == 4
    for key, factor in factors.items():
        assert metrics[f"{key}.min"] == pytest.approx(float(factor.diagonal().min()))
        assert metrics[f"{key}.max"] == pytest.approx(float(factor.abs().max()))  # positive definite
    assert metrics["factor_min"] == min(metrics[f"{key}.min"] for key in factors)
    assert metrics["factor_max"] == max(metrics[f"{key}.max"] for key in factors)
    assert 0 < metrics["factor_min"] < metrics["factor_max"] <= 1


def test_metrics_count_skipped_steps():
    step = make_step(return_outputs=True)
    step(X, Y)
    step(X * math.nan, Y)
    metrics = step.metrics()
    assert metrics["skipped"] == 1 and math.isnan(metrics["loss"])


@pytest.mark.parametrize("mode", ["step", "backward"])
def test_metrics_of_a_drop_in_model_change_nothing(mode):
    model = nn.Linear(6, 4)
    compiled = mkor_fx.compile(model, backend="eager", precondition=mode, rule=MKOR.published())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.mse_loss(compiled(X), Y).backward()
    compiled.mkor.metrics()
    F.mse_loss(compiled(X), Y).backward()  # a second micro-batch: statistics still wait
    optimizer.step()
    optimizer.zero_grad()
    F.mse_loss(compiled(X), Y).backward()
    assert compiled.mkor.metrics()["steps"] == 1
    assert set(compiled.mkor.metrics()) == {"steps", "refreshes", "factor_min", "factor_max"}


def test_metrics_without_square_factors():
    step = make_step(rule=MKOR.published(max_factor=5))
    step(X, Y)
    assert {k for k in step.metrics(per_factor=True) if k.endswith(".L.min")} == {"0.weight.L.min", "2.weight.L.min"}
    assert "factor_min" not in make_step(rule=None).metrics()


def test_a_line_is_written_at_the_end_and_not_more_often_than_asked():
    step, out, seen = make_step(), io.StringIO(), []
    for x, y in mkor_fx.progress([(X, Y)] * 5, step, every=3600, file=out):
        seen.append(step(x, y))
    (line,) = out.getvalue().splitlines()
    assert len(seen) == 5
    assert line.startswith("5/5 (100%)  loss ") and "5 refreshes" in line and "factors" in line and "steps/s" in line
    assert f"loss {float(seen[-1]):.4g}" in line


def test_lines_while_it_runs():
    step, out = make_step(), io.StringIO()
    for x, y in mkor_fx.progress(iter([(X, Y)] * 3), step, every=0, file=out):
        step(x, y)
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "3"]  # no total of an iterator


def test_a_terminal_has_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    model = nn.Linear(6, 4)
    compiled, out = mkor_fx.compile(model, backend="eager", rule=MKOR.published()), Terminal()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in mkor_fx.progress(iter([(X, Y)] * 3), compiled, total=4, every=0, file=out):
        F.mse_loss(compiled(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.getvalue().count("\n") == 1 and out.getvalue().count("\r") == 4
    assert "3/4 (75%)" in out.getvalue() and "loss" not in out.getvalue()


def test_metrics_are_read_only_when_a_line_is_drawn():
    class Counting:
        reads = 0

        def metrics(self):
            self.reads += 1
            return {"refreshes": 0}

    source = Counting()
    for _ in mkor_fx.progress(range(100), source, every=3600, file=io.StringIO()):
        pass
    assert source.reads == 1


def test_progress_wants_a_step():
    with pytest.raises(ValueError, match="compiled step or model, not a Linear"):
        mkor_fx.progress([], nn.Linear(2, 2))
