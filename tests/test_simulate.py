"""simulate: the step that compile_step would run, laid out in time by estimates, and nothing else touched."""

import copy
import json
import re
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import zoo
from browser import visit
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import mkor_fx
from mkor_fx import Communication
from mkor_fx.doors.simulate import Machines, lay_out, simulate_step
from mkor_fx.options import Options
from mkor_fx.passes.order import estimate
from mkor_fx.passes.order.collectives import Group, Network, Sizes, describe
from mkor_fx.passes.order.estimate import DEVICES
from mkor_fx.passes.torch_api.tracing import insert
from mkor_fx.show.timeline import COMMUNICATION, COMPUTE, Simulation

PUBLISHED = mkor_fx.MKOR.published()

H100 = DEVICES["h100"]


def simulate(name="mlp", **options):
    model, loss_fn, batches = zoo.build(name, steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return mkor_fx.simulate(model, *batches[0], loss_fn=loss_fn, optimizer=optimizer, **options)


@pytest.fixture(scope="module")
def simulation():
    return simulate()


# ---- the two lanes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def seconds(monkeypatch):
    """Every product takes 1 ms, every collective 10, the rest nothing."""
    module = sys.modules["mkor_fx.doors.simulate"]
    monkeypatch.setattr(module, "collective_milliseconds", lambda *_: 10.0)
    monkeypatch.setattr(module, "product_milliseconds", lambda *_: 1.0)
    monkeypatch.setattr(module, "transfer_milliseconds", lambda *_: 0.0)


def written(*program):
    """A graph of products ("mm"), starts ("+a") and waits ("-a") in this order."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(4, 4)
    network, last, starts = Network(graph, Group("g", 2, Sizes())), x, {}
    for word in program:
        if word == "mm":
            last = insert(graph, torch.mm, last, x)
        elif word[0] == "+":
            network.sum(last, "gradient", word[1:])
            *_, start, wait, result = list(graph.nodes)
            starts[word[1:]] = start
            graph.erase_node(result)
            graph.erase_node(wait)
        else:
            start = starts[word[1:]]
            wait = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (start,))
            wait.meta["val"] = start.meta["val"]
    graph.output(last)
    return list(lay_out(graph, {"g": 2}, H100, {}))


@pytest.mark.parametrize(
    "program, sent, stalls, end",
    [
        (["mm", "+a", "mm", "mm", "-a", "mm"], [(1, 11)], [(3, 8)], 12),
        (["mm", "+a", *["mm"] * 10, "-a", "mm"], [(1, 11)], [(11, 0)], 12),
        (["+a", "mm", "+b", "mm", "-a", "mm", "-b", "mm"], [(0, 10), (10, 20)], [(2, 8), (11, 9)], 21),  # one network
        (["+a", "-a", *["mm"] * 3, "+b", "-b"], [(0, 10), (13, 23)], [(0, 10), (13, 10)], 23),
        (["mm", "mm"], [], [], 2),
    ],
)
def test_collectives_run_beside_products_until_someone_waits(seconds, program, sent, stalls, end):
    events = written(*program)
    assert [(e.start, e.end) for e in events if e.lane == COMMUNICATION] == sent
    assert [(e.start, e.duration) for e in events if e.op == "wait"] == stalls
    assert [e.exposed for e in events if e.lane == COMMUNICATION] == [stall for _, stall in stalls]
    whole = Simulation("step", 2, H100, tuple(events))
    products = program.count("mm")
    assert (whole.total_ms, whole.compute_ms, whole.communication_ms) == (end, products, 10 * len(sent))
    assert whole.exposed_ms == end - products == sum(stall for _, stall in stalls)
    assert whole.hidden == (1 - whole.exposed_ms / whole.communication_ms if sent else 1)


# ---- estimates ------------------------------------------------------------------------------------------------------


def traced(function, *shapes, dtype=torch.float32):
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    with FakeTensorMode():
        for node, shape in zip(inputs, shapes, strict=True):
            node.meta["val"] = torch.empty(shape, dtype=dtype)
    graph.output(insert(graph, function, *inputs))
    return graph


@pytest.mark.parametrize(
    "rows, dtype, milliseconds",
    [
        (4096, torch.bfloat16, 2 * 4096**3 / (0.75 * 989.5e12) * 1e3),
        (4096, torch.float32, 2 * 4096**3 / (0.75 * 67e12) * 1e3),
        (1, torch.bfloat16, (2 * 4096 + 4096**2) * 2 / 3350e9 * 1e3),  # a vector: memory is what takes long
    ],
)
def test_a_product_takes_its_flops_or_its_bytes(rows, dtype, milliseconds):
    (node,) = traced(torch.mm, (rows, 4096), (4096, 4096), dtype=dtype).find_nodes(
        op="call_function", target=torch.ops.aten.mm.default
    )
    assert estimate.product_milliseconds(node, H100) == pytest.approx(milliseconds)


def test_cheap_nodes_between_products_are_one_kernel():
    def cheap(x, y):
        z = (x * 2 + y).relu()
        return z.t() + x.sum(), x

    nodes = [node for node in traced(cheap, (32, 32), (32, 32)).nodes if node.op == "call_function"]
    matrix = 32 * 32 * 4
    assert sum(estimate.fused_bytes(nodes).values()) == 3 * matrix  # x and y in, one result out
    alone = sum(sum(estimate.fused_bytes([node]).values()) for node in nodes)
    assert alone > 6 * matrix


def all_reduce(size, ranks, device="h100"):
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(size // 4)
    Network(graph, Group("g", ranks, Sizes())).sum(x, "gradient", "x")
    (start,) = graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default)
    return estimate.collective_milliseconds(start, ranks, DEVICES[device])


def test_collectives_follow_bandwidth_and_latency():
    assert all_reduce(1 << 20, 1) == 0
    ring = 2 * 7 / 8 * (1 << 30) / 370e9 * 1e3  # over NVLink, as NCCL counts it
    assert all_reduce(1 << 30, 8) == pytest.approx(ring, rel=0.1)
    assert all_reduce(1 << 30, 8, "a100") > 1.3 * all_reduce(1 << 30, 8)
    assert all_reduce(1 << 30, 64) > 2 * all_reduce(1 << 30, 8)  # between nodes
    small = [all_reduce(4 << 10, ranks) for ranks in (2, 8, 64)]
    assert small == sorted(small) and small[0] < 0.02 and small[2] < 0.1
    assert 12 * all_reduce(8 << 10, 64) > 4 * all_reduce(96 << 10, 64)  # why there are buckets


def test_broadcasts_are_not_free():
    buffers = [e for e in simulate("cnn").lane(COMMUNICATION) if e.op == "broadcast"]
    assert buffers and all(e.duration > 0 and "buffer" in e.label for e in buffers)


# ---- a whole step -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [{}, {"statistics_bytes": 64, "gradient_bytes": 256}])
def test_collectives_are_those_of_compile_step(one_rank, sizes):
    """Beside an initialised process group, which it neither uses nor changes."""
    before = dist.group.WORLD
    communication = Communication(**sizes)
    simulated = simulate(communication=communication, rule=PUBLISHED)
    assert dist.group.WORLD is before and dist.get_world_size() == 1
    model, loss_fn, batches = zoo.build("mlp", steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, communication=communication, backend="eager", rule=PUBLISHED)
    step(*batches[0])
    issued = [line.partition(": ")[2] for line in describe(step.graphs["schedule"].graph)]
    assert [", ".join(e.messages) for e in simulated.lane(COMMUNICATION)] == issued
    assert len(issued) >= 3


def test_the_passes_shorten_what_is_exposed():
    """Everything is exposed where each collective is awaited at once; the order hides most, buckets take less."""
    width = 1024
    with FakeTensorMode():
        model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))
        x = torch.empty(1 << 15, width)

    def seen(*without):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = Options(communication=Communication(gradient_bytes=2 * width * width * 4), without=without)
        return simulate_step(model, (x, x), {}, functional.mse_loss, optimizer, options, Machines(8, "h100"))

    trace, scheduled, bucketed = seen("schedule", "bucket"), seen("bucket"), seen()
    assert trace.exposed_ms == pytest.approx(trace.communication_ms)
    assert scheduled.communication_ms == pytest.approx(trace.communication_ms)
    assert scheduled.exposed_ms < 0.3 * trace.exposed_ms
    assert bucketed.communication_ms < scheduled.communication_ms
    assert bucketed.exposed_ms <= scheduled.exposed_ms


class Counted(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_is_changed(steps):
    model = Counted(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    for _ in range(steps):
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    attributes = set(vars(model))
    keep = lambda: copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()],
                                  torch.get_rng_state(), model.calls))  # fmt: skip
    before = keep()
    mkor_fx.simulate(model, x, y, loss_fn=functional.mse_loss, optimizer=optimizer)
    torch.testing.assert_close(keep(), before, rtol=0, atol=0)
    assert set(vars(model)) == attributes
    assert not dist.is_initialized()


def test_phases_and_labels(simulation):
    phases = set(simulation.phases())
    assert {"forward", "backward", "statistics", "refresh and precondition", "optimizer"} <= phases
    assert sum(simulation.phases().values()) == pytest.approx(simulation.compute_ms)
    labels = {event.label for event in simulation.lane(COMPUTE)}
    assert {"gradient of head.weight", "head.weight: refresh and precondition", "hidden"} <= labels
    refreshing = simulation.phases()["refresh and precondition"]
    reusing = simulate(refresh=False)
    assert "refresh and precondition" not in reusing.phases() and 0 < reusing.phases()["precondition"] < refreshing
    plain = simulate(rule=None)
    assert plain.compute_ms < reusing.compute_ms and "precondition" not in plain.phases()
    assert not any("statistics" in event.label for event in plain.events)


def test_devices_and_ranks(simulation):
    assert simulate(device="h200").compute_ms < simulation.compute_ms < simulate(device="a100").compute_ms
    alone = simulate(world_size=1)
    assert alone.communication_ms == alone.exposed_ms == 0 and alone.hidden == 1


def test_a_model_of_no_memory():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(1 << 15, 1 << 14), nn.Tanh(), nn.Linear(1 << 14, 10))
        x, y = torch.empty(64, 1 << 15), torch.zeros(64, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())
    large = mkor_fx.simulate(model, x, y, loss_fn=functional.cross_entropy, optimizer=optimizer)
    assert max(e.bytes for e in large.lane(COMMUNICATION)) == 4 << 29


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "h1000"}, r"device='h1000': must be one of 'a100', 'h100', 'h200'"),
        ({"world_size": 0}, r"world_size=0: must be an integer of at least 1"),
        ({"world_size": 2.0}, r"world_size=2.0: must be an integer"),
        ({"communication": 128}, r"communication=128: must be a mkor_fx.Communication"),
        ({"rule": "mkor"}, r"rule='mkor': must be an update rule"),
        ({"skip": "nothing*"}, r"skip pattern 'nothing\*' matches no parameter"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(**options)


def test_bad_models_and_batches():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="pass one rank's batch"):
        mkor_fx.simulate(model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"the loss has shape \(4, 2\)"):
        mkor_fx.simulate(model, x, optimizer=optimizer)
    with pytest.raises(ValueError, match="optimizer"):
        mkor_fx.simulate(nn.Linear(3, 2), x, optimizer=optimizer)
    with pytest.raises(ValueError, match="FakeTensorMode"):
        meta = nn.Linear(3, 2, device="meta")
        mkor_fx.simulate(meta, x.to("meta"), optimizer=torch.optim.SGD(meta.parameters(), lr=0.1))


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_the_table_says_that_it_estimates(simulation):
    text = str(simulation)
    assert "estimated" in text.splitlines()[0] and f"{simulation.total_ms:.3f} ms a step" in text.splitlines()[0]
    heads = [line for line, below in pairwise(text.splitlines()) if re.match("-{3}", below)]
    assert len(heads) == 2 and all("estimated" in head for head in heads)
    assert text.endswith(simulation.note) and "not measurements" in simulation.note
    for event in simulation.lane(COMMUNICATION):
        assert event.label in text
    assert len(simulation.table(everything=True).splitlines()) > len(text.splitlines()) + len(simulation.events)


def test_the_chrome_trace(simulation, tmp_path):
    simulation.to_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(simulation.events) and all(span["args"]["estimated"] for span in spans)
    lanes = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert lanes == {0: "compute (estimated)", 1: "communication (estimated)"}
    for lane in lanes:
        own = [span for span in spans if span["tid"] == lane]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-9 for a, b in pairwise(own))
    assert max(s["ts"] + s["dur"] for s in spans) == pytest.approx(1e3 * simulation.total_ms)


def test_the_page(simulation, tmp_path):
    page = tmp_path / "timeline.html"
    simulation.to_html(page)
    text = page.read_text()
    assert "http://" not in text and "https://" not in text and text.count("</script>") == 2
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    shown = visit(page)
    assert simulation.note in shown and f"{100 * simulation.hidden:.1f} %" in shown
    body = shown.partition("<main>")[2].partition('<script id="data"')[0]
    assert all(event.label in body for event in simulation.lane(COMMUNICATION))
    drawn = set(re.findall(r'<rect[^>]*data-event="(\d+)"', body))
    assert {str(i) for i, e in enumerate(simulation.events) if e.lane == COMMUNICATION} <= drawn
