"""bucket, schedule and pin one by one, and the order of Inductor's generated code."""

import re
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mkor_fx
from mkor_fx import Communication
from mkor_fx.ir import StepGraph
from mkor_fx.passes.order.bucket import bucket
from mkor_fx.passes.order.collectives import Group, Network, Sizes, describe, is_start, is_wait, starts
from mkor_fx.passes.order.pin import pin
from mkor_fx.passes.order.schedule import hidden_under, is_heavy, schedule
from mkor_fx.passes.torch_api.tracing import insert

WIDTH = 8


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def group_of(sizes):
    return Group(dist.group.WORLD.group_name, 1, sizes)


def half(x, y, scale):
    return torch.cat([x.sum(0), y.sum(0) * scale, (y * y).sum().reshape(1)])


def program(layers=4):
    """Products forward and backward; each layer's vector (one of them a sum of two) and gradient are summed over ranks.
    Outputs: what has been summed, and its sum as a write to an input."""
    graph, mode = fx.Graph(), FakeTensorMode()
    network = Network(graph, group_of(Sizes()))

    def given(name, *shape):
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(*shape)
        return node

    x, weights = given("x", 5, WIDTH), [given(f"w{i}", WIDTH, WIDTH) for i in range(layers)]
    kept = given("kept", WIDTH, WIDTH)
    act = [x]
    for w in weights:
        act.append(insert(graph, torch.mm, act[-1], w))
    seed = graph.call_function(torch.ops.aten.full.default, ([], 2.0))
    with mode:
        seed.meta["val"] = torch.full([], 2.0)
    g, grads, outputs = insert(graph, torch.mul, act[-1], seed), {}, []
    gradients = {layers - 1: g}
    for i in reversed(range(layers)):
        grads[i] = insert(graph, torch.mm, insert(graph, torch.t, act[i]), gradients[i])
        gradients[i - 1] = insert(graph, torch.mm, gradients[i], insert(graph, torch.t, weights[i]))
    total = kept
    for i in range(layers):
        label = f"w{i}"
        vector = insert(graph, half, act[i], gradients[i], 1.0, label=label)
        if i == 1:
            other = insert(graph, half, act[i], gradients[i], 3.0, label=label)
            vector = insert(graph, torch.add, vector, other, label=label)
        outputs += [network.sum(vector, "statistics", label), network.sum(grads[i], "gradient", label)]
        product = insert(graph, torch.mm, outputs[-1], weights[i], label=label)
        total = insert(graph, torch.add, total, product, label=label)
    copy = graph.call_function(torch.ops.aten.copy_.default, (kept, total))
    copy.meta["val"] = kept.meta["val"]
    graph.output(outputs)
    return StepGraph(fx.GraphModule({}, graph), graph.find_nodes(op="placeholder"), {}, [seed])


def outputs_of(step):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n.meta["val"].shape, generator=generator) for n in step.graph.find_nodes(op="placeholder")]
    results = [t.clone() for t in fx.Interpreter(step.module).run(*inputs)]
    return [*results, inputs[-1]]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_bucket_changes_no_bit_and_leaves_few_collectives():
    step = program()
    before = outputs_of(step)
    assert len(starts(step.graph)) == 8
    bucket(step, group=group_of(Sizes()))
    step.graph.lint()
    assert equal(outputs_of(step), before)
    vectors = [message for message in describe(step.graph) if "statistics" in message]
    matrices = [message for message in describe(step.graph) if "gradient" in message]
    assert len(vectors) == 2 and len(matrices) == 1
    assert "gradient of w3 [64], gradient of w2 [64], gradient of w1 [64], gradient of w0 [64]" in matrices[0]


def test_bucket_sends_what_the_forward_has_by_itself():
    step = program()
    bucket(step, group=group_of(Sizes()))
    forward = [start for start in starts(step.graph) if [m.numel for m in start.meta["mkor_messages"]] == [WIDTH] * 4]
    (start,) = forward
    assert [m.name for m in start.meta["mkor_messages"]] == ["w0", "w1", "w2", "w3"]
    needed, ancestors = [start], set()
    while needed:
        for node in needed.pop().all_input_nodes:
            if node not in ancestors:
                ancestors.add(node)
                needed.append(node)
    assert step.seeds[0] not in ancestors


@pytest.mark.parametrize("size, gradients", [(1, 4), (WIDTH * WIDTH * 4 + 1, 2), (WIDTH * WIDTH * 8 + 1, 2)])
def test_bucket_is_full_at_its_size(size, gradients):
    step = program()
    before = outputs_of(step)
    bucket(step, group=group_of(Sizes(gradients=size)))
    assert sum("gradient" in line for line in describe(step.graph)) == gradients
    assert equal(outputs_of(step), before)


def test_bucket_in_half_precision_spares_single_numbers():
    step = program()
    before = outputs_of(step)
    bucket(step, group=group_of(Sizes(dtype=torch.bfloat16)))
    after = outputs_of(step)
    assert not equal(after, before)
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)
    for vector, exact in zip(after[:-1:2], before[:-1:2], strict=True):
        assert vector[-1] == exact[-1]


def heavy_between(nodes, first, last):
    return [node for node in nodes[nodes.index(first) : nodes.index(last)] if is_heavy(node)]


@pytest.mark.parametrize("bucketed", [False, True])
def test_schedule_starts_at_once_and_waits_late(bucketed):
    step = program()
    before = outputs_of(step)
    if bucketed:
        bucket(step, group=group_of(Sizes(gradients=2 * WIDTH * WIDTH * 4)))
    schedule(step)
    step.graph.lint()
    assert equal(outputs_of(step), before)
    nodes = list(step.graph.nodes)
    kinds = [{True: "start", False: "wait"}[is_start(n)] for n in nodes if is_start(n) or is_wait(n)]
    assert kinds == sorted(kinds)  # all starts, then all waits, in the same order
    assert [n.args[0] for n in nodes if is_wait(n)] == starts(step.graph)
    for start in starts(step.graph):
        producer = start
        while not is_heavy(producer) and producer.all_input_nodes:
            producer = max(producer.all_input_nodes, key=nodes.index)
        assert heavy_between(nodes, producer, start) in ([], [producer])
    first_wait = next(n for n in nodes if is_wait(n))
    assert all(nodes.index(n) < nodes.index(first_wait) for n in nodes if is_heavy(n) and n.name.startswith("mm") and
               not any(is_wait(a) for a in ancestors_of(n)))  # fmt: skip
    assert nodes[-2].target is torch.ops.aten.copy_.default


def ancestors_of(node):
    found, needed = set(), [node]
    while needed:
        new = [a for a in needed.pop().all_input_nodes if a not in found]
        found.update(new)
        needed += new
    return found


def test_schedule_works_on_results_in_the_order_of_their_arrival():
    step = program()
    bucket(step, group=group_of(Sizes(gradients=1)))
    schedule(step)
    nodes = list(step.graph.nodes)
    waits = [node for node in nodes if is_wait(node)]
    under = [heavy_between(nodes, one, other) for one, other in pairwise(waits)]
    assert sum(map(bool, under)) >= 2  # the first gradients' products stand between the waits for later ones


def test_pin_makes_the_order_a_dependency():
    step = program()
    before = outputs_of(step)
    bucket(step, group=group_of(Sizes(gradients=1)))
    schedule(step)
    between = hidden_under(step.graph).values()
    waits = sum(map(bool, between))
    firsts = {next(filter(is_heavy, nodes)) for nodes in between if any(map(is_heavy, nodes))}
    pin(step.graph)
    step.module.recompile()
    step.graph.lint()
    pinned = [n for n in step.graph.nodes if str(n.target) == "control_deps"]
    assert len(pinned) == waits + len(firsts) > 4
    assert equal(outputs_of(step), before)


def test_nothing_to_do_without_collectives():
    step = program(0)
    before = list(step.graph.nodes)
    bucket(step, group=group_of(Sizes()))
    schedule(step)
    pin(step.graph)
    assert list(step.graph.nodes) == before


def sequence(code):
    """Products, starts and waits in the order of generated code: ``["mm", "start", ...]``."""
    kinds = {r"all_reduce_?\.default|broadcast_?\.default": "start", r"wait_tensor\.default": "wait",
             r"extern_kernels\.\w*mm": "mm"}  # fmt: skip
    lines = [line.strip() for line in code[code.index("def call(") :].splitlines()]
    found = [[kind for pattern, kind in kinds.items() if re.search(pattern, line)] for line in lines if line[:1] != "#"]
    return [kind for line in found for kind in line]


def test_generated_code_keeps_the_order():
    layers, width = 4, 32
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    communication = Communication(statistics_bytes=width * 4 * 2, gradient_bytes=width * width * 4)
    step = mkor_fx.compile_step(model, nn.functional.mse_loss, optimizer, communication=communication)
    x = torch.randn(16, width)
    step(x, x)
    (code,) = step.graphs.code
    order = sequence(code)
    issued = order.count("start")
    assert issued == order.count("wait") == len(describe(step.graphs["schedule"].graph)) >= 2 * layers
    assert "start" not in order[order.index("wait") :]  # everything is under way before anything is waited for
    assert "start" in order[: layers + 1]  # the first statistics leave in the forward
    backward = order[: order.index("wait")]
    assert sum(one == "start" and other == "mm" for one, other in pairwise(backward)) >= layers
    tail = order[order.index("wait") :]
    assert sum(one == "mm" and other == "wait" for one, other in pairwise(tail)) >= 2  # updates hide the last ones
