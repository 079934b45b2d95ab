"""The estimated timeline: its lanes add up, its order is the graph's, and the passes shorten it."""

import json
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mkor_fx
from benchmarks.overlap import passes
from mkor_fx import MKOR, Communication
from mkor_fx.passes.estimate import nccl_milliseconds

LAYERS, WIDTH, RULE = 6, 1024, MKOR()


def simulated(*on, world_size=64, rule=RULE):
    model = nn.Sequential(*(m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.empty(16384, WIDTH)
    communication = Communication(gradient_bytes=2 * WIDTH * WIDTH * 4)
    with passes(*on):
        schedule = mkor_fx.simulate(
            model, nn.functional.mse_loss, optimizer, x, x, rule=rule, world_size=world_size,
            communication=communication,
        )  # fmt: skip
    assert not dist.is_initialized() and not optimizer.state
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return schedule


def test_lanes_add_up():
    schedule = simulated("schedule", "bucket")
    assert schedule.step == pytest.approx(schedule.total("compute") + schedule.exposed)
    for lane in ("compute", "communication"):
        spans = [span for span in schedule.spans if span.lane == lane]
        assert all(b.start >= a.start + a.length - 1e-9 for a, b in pairwise(spans))
    products = LAYERS * 3 - 1 + LAYERS * 2  # forward, both backward but for the inputs' gradient, preconditioning
    flops = (LAYERS * 3 - 1) * 2 * 16384 * WIDTH**2 + LAYERS * 2 * 2 * WIDTH**3
    least = flops / (0.75 * 494e12) * 1e3
    assert sum(" " not in s.name and s.name.startswith("mm") for s in schedule.spans) <= products
    assert least < schedule.total("compute") < 4 * least


def test_passes_shorten_what_is_exposed():
    trace, scheduled, bucketed = (simulated(*on, world_size=8) for on in ((), ("schedule",), ("schedule", "bucket")))
    assert trace.exposed == pytest.approx(trace.total("communication"), rel=1e-6)
    assert scheduled.exposed < 0.5 * trace.exposed
    assert bucketed.total("communication") < scheduled.total("communication")
    assert bucketed.exposed <= scheduled.exposed


def test_communication_is_by_the_model_of_nccl():
    schedule = simulated("schedule", rule=None)
    gradients = [s for s in schedule.spans if s.lane == "communication" and "gradient" in s.name]
    expected = nccl_milliseconds(WIDTH * WIDTH * 4, 64, "all_reduce")
    assert len(gradients) == LAYERS and all(s.length == pytest.approx(expected) for s in gradients)
    assert nccl_milliseconds(1 << 20, 64, "all_reduce") > nccl_milliseconds(1 << 20, 8, "all_reduce") > 0
    assert simulated("schedule", world_size=1).total("communication") == 0


def test_timelines(tmp_path):
    schedule = simulated("schedule", "bucket")
    schedule.to_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(schedule.spans)
    assert sum(e["dur"] for e in spans if e["tid"] == 2) == pytest.approx(schedule.exposed * 1e3)
    schedule.to_html(tmp_path / "timeline.html")
    page = (tmp_path / "timeline.html").read_text()
    assert page.count("<rect") == len(schedule.spans) and "estimated" in page and "gradient of 10.weight" in page
    assert "64 x h100" in str(schedule) and "exposed" in str(schedule)


def test_what_it_cannot_do():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="device='tpu'"):
        mkor_fx.simulate(model, nn.functional.mse_loss, optimizer, torch.ones(1, 2), torch.ones(1, 2), device="tpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="not initialised"):
            mkor_fx.simulate(model, nn.functional.mse_loss, optimizer, torch.ones(1, 2), torch.ones(1, 2))
    finally:
        dist.destroy_process_group()
