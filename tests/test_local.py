"""placement="local" (DP-KFAC): each weight's owner takes its statistics from its own rows, none cross the network."""

import dataclasses
import math

import processes
import pytest
import torch
import torch.distributed as dist
from test_distributed import assert_bitwise, assert_close
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import EKFAC, KFAC, MKOR, SOAP, Communication, HyLo, Speeds
from mkor_fx.options import Options
from mkor_fx.passes.order.collectives import describe, starts
from mkor_fx.passes.write.placement import Load, apart
from mkor_fx.show.timeline import COMMUNICATION

PLAIN = KFAC(damping=0.1, decay=0.5, derive_every=1, pi=False, graft=None)
#: input and output sizes; what is padded at 15 % of these lets 20 x 60 be an all-reduce and a broadcast
SIZES = [(12, 20), (20, 60), (60, 8), (8, 8)]
RATE = 0.05


def network(sizes=SIZES):
    torch.manual_seed(0)
    return nn.Sequential(*(layer for i, o in sizes for layer in (nn.Linear(i, o), nn.Tanh())))


def batch_of(step, rank, rows=6):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = (1 + rank) * torch.randn(rows, 12, generator=generator) + rank
    return x, torch.randn(rows, 8, generator=generator)


def by_hand(owners, size, steps):
    """K-FAC with the statistics of owners' rows, in plain eager torch; parameters at the end."""
    model = network()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    factors = dict.fromkeys(layers)
    seen = {}

    def see(layer, inputs, output):
        output.retain_grad()
        seen[layer, "a"], seen[layer, "out"] = inputs[0].detach(), output

    for layer in layers:
        layer.register_forward_hook(see)
    inverses = {layer: (torch.eye(layer.out_features), torch.eye(layer.in_features)) for layer in layers}
    for step in range(steps):
        means = {p: torch.zeros_like(p) for p in model.parameters()}
        statistics = {}
        for rank in range(size):
            x, y = batch_of(step, rank)
            model.zero_grad()
            functional.mse_loss(model(x), y).backward()
            for p in model.parameters():
                means[p] += p.grad / size
            for i, layer in enumerate(layers):
                if owners[f"{2 * i}.weight"] == rank:
                    a, g = seen[layer, "a"], seen[layer, "out"].grad
                    statistics[layer] = (len(x) * g.T @ g, a.T @ a / len(x))
        with torch.no_grad():
            for layer in layers:
                left, right = inverses[layer]
                layer.weight -= RATE * left @ means[layer.weight] @ right
                layer.bias -= RATE * left @ means[layer.bias]
                old = factors[layer]
                factors[layer] = [new if old is None else (old[at] + new) / 2 for at, new in enumerate(statistics[layer])]
                inverses[layer] = tuple(torch.linalg.inv(f + 0.1 * torch.eye(len(f))) for f in factors[layer])
    return {name: p.detach() for name, p in model.named_parameters()}


def train(rank, size, door, rule, steps=4, *, alike=False, placement="local", resume_at=None, **options):
    """Parameters and factors at the end, owners, and the collectives of the program that preconditions."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    given = {"placement": placement, "backend": "eager", **options}

    def opened(model, optimizer):
        if door == "step":
            return (step := mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, **given)), step.mkor, step
        compiled = mkor_fx.compile(model, rule, **given)

        def step(x, y):
            optimizer.zero_grad()
            functional.mse_loss(compiled(x), y).backward()
            for p in model.parameters() if size > 1 else ():
                dist.all_reduce(p.grad)
                p.grad /= size
            optimizer.step()

        return step, compiled.mkor, compiled

    step, mkor, holder = opened(model, optimizer)
    for i in range(steps):
        if i == resume_at:
            state, weights = mkor.state_dict(full=True), {k: t.clone() for k, t in model.state_dict().items()}
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            step, mkor, holder = opened(model, optimizer)
            model.load_state_dict(weights)
            mkor.load_state_dict(state)
        step(*batch_of(i, 0 if alike else rank))
    graph = holder.variants["refresh"] if door == "step" else holder.graphs.updates[0]
    program = graph["schedule"].graph
    sent = [(s.target.__name__, s.args[0].meta["val"].numel(), s.meta["mkor_messages"][0].kind) for s in starts(program)]
    about = {"lines": describe(program), "sent": sent, "own": sorted(mkor.tensors()), "table": str(holder.coverage),
             "dict": holder.coverage.to_dict()}  # fmt: skip
    return {**model.state_dict(), **mkor.state_dict(full=True)}, dict(mkor.owners), about


@pytest.mark.parametrize("door", ["step", "loop"])
def test_training_is_that_of_owners_rows(door):
    ranks = processes.values(train, 2, door, PLAIN)
    assert_bitwise([state for state, *_ in ranks])
    owners = ranks[0][1]
    assert owners == ranks[1][1] and set(owners.values()) == {0, 1}
    expected = by_hand(owners, 2, 4)
    assert_close({name: ranks[0][0][name] for name in expected}, expected, 1e-5)
    other = by_hand({name: 1 - owner for name, owner in owners.items()}, 2, 4)
    assert any((other[name] - expected[name]).abs().max() > 1e-4 for name in expected)  # whose rows they are is seen
    for rank, (_, _, about) in enumerate(ranks):
        assert about["lines"] == ranks[0][2]["lines"]
        assert {key.rpartition(".")[0] for key in about["own"]} == {n for n, owner in owners.items() if owner == rank}


SPREAD = {"rule": dataclasses.replace(PLAIN, derive_every=2), "derive": "spread"}


def compiled(rank, size, door, options):
    return [train(rank, size, door, backend=backend, steps=3, **options)[0] for backend in ("eager", "inductor")]


@pytest.mark.nightly
@pytest.mark.parametrize("door", ["step", "loop"])
@pytest.mark.parametrize("options", [{"rule": PLAIN}, SPREAD], ids=["plain", "spread"])
def test_compiled_it_is_the_same(door, options):
    ranks = processes.values(compiled, 2, door, options)
    assert_bitwise([inductor for _, inductor in ranks])
    eager, inductor = ({name: state[name] for name in network().state_dict()} for state in ranks[0])
    assert_close(inductor, eager, 1e-5)


@pytest.mark.parametrize("door", ["step", "loop"])
def test_nothing_but_gradients_and_directions_is_sent(door):
    parameters = sum(i * o + o for i, o in SIZES)
    for _, _, about in processes.values(train, 2, door, PLAIN, 2):
        numbers = {}
        for operation, numel, kind in about["sent"]:
            numbers.setdefault((operation.partition(".")[0], kind), []).append(numel)
        assert not any("statistics of" in line for line in about["lines"])
        if door == "loop":
            assert list(numbers) == [("broadcast", "direction")] and sum(numbers["broadcast", "direction"]) == parameters
        else:
            # what is owned: scattered once and gathered once, padded; what is apart: summed and broadcast
            apart_ = sum(numbers.get(("broadcast", "direction"), [0]))
            assert apart_ == 20 * 60 + 60
            assert sum(numbers["all_reduce", "gradient"]) == apart_
            scattered = numbers["reduce_scatter_tensor", "gradient"]
            gathered = numbers["all_gather_into_tensor", "direction"]
            assert sum(scattered) == 2 * sum(gathered)
            assert parameters - apart_ <= sum(scattered) <= parameters - apart_ + 0.15 * parameters
        assert about["dict"]["sent"] == 0 and {p["sent"] for p in about["dict"]["parameters"]} == {0}
        assert "statistics are those of the owner's rows alone" in about["table"] and "owner 0: " in about["table"]


CASES = {
    "clipped": (KFAC(damping=0.1, derive_every=2, graft=None, kl_clip=1e-3), ("step", "loop")),
    "mkor": (MKOR.published(), ("step", "loop")),
    "by rows": (EKFAC(damping=0.1, derive_every=2), ("step",)),
    "gradient": (SOAP(), ("step",)),
}


def train_alike(rank, size, door, case):
    return train(rank, size, door, CASES[case][0], 4, alike=True, refresh_every=2)


@pytest.mark.parametrize(("case", "door"), [(case, door) for case, (_, doors) in CASES.items() for door in doors])
def test_where_ranks_have_the_same_rows_it_is_one_process(case, door):
    """With as many rows as one process: refreshes, moments, clips and skips."""
    ranks = processes.values(train_alike, 2, door, case)
    assert_bitwise([state for state, *_ in ranks])
    alone, owners, _ = train_alike(0, 1, door, case)
    assert set(owners.values()) <= {None}  # nothing to divide
    names = network().state_dict() if case == "by rows" else alone  # bases of equal eigenvalues are any
    assert_close({name: ranks[0][0][name] for name in names}, {name: alone[name] for name in names}, 2e-5)


def resumed(rank, size, door):
    return [train(rank, size, door, KFAC(damping=0.1, derive_every=2), 5, resume_at=at)[0] for at in (None, 3)]


@pytest.mark.parametrize("door", ["step", "loop"])
def test_a_whole_checkpoint_goes_on_where_it_was(door):
    for states in processes.values(resumed, 2, door):
        assert_bitwise(states)


def unlike_batches(rank, size):
    """One rank has twice as many rows; a part of a batch is a part of the step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    communication = Communication(average="rows", padding=math.inf)
    options = {"placement": "local", "backend": "eager", "communication": communication, "accumulate": 2}
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, PLAIN, **options)
    for i in range(3):
        x, y = batch_of(i, 0, rows=4)
        step(*((x, y) if rank == 0 else (torch.cat([x, x]), torch.cat([y, y]))))
    assert all(op != "broadcast" for op, _ in ((s.target.__name__.partition(".")[0], s) for s in
               starts(step.variants["refresh"]["schedule"].graph)))  # fmt: skip
    return {**model.state_dict(), **step.mkor.state_dict(full=True)}


def test_a_share_of_the_batch_and_its_parts_leave_the_scale():
    """The same rows, once on one rank, twice on the other: each owner's statistics are those of the four rows."""
    ranks = processes.values(unlike_batches, 2)
    assert_bitwise(ranks)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, PLAIN, backend="eager")
    for i in range(3):
        step(*batch_of(i, 0, rows=4))
    assert_close(ranks[0], {**model.state_dict(), **step.mkor.state_dict()}, 2e-5)


def test_what_is_apart_is_as_little_as_padding_allows():
    loads = {"large": Load(1, 1000), **{f"{i}": Load(1, 100) for i in range(6)}}
    owners = {"large": 0, **{f"{i}": i % 3 for i in range(6)}}
    assert apart(loads, owners, 3, math.inf) == set()
    assert apart(loads, owners, 3, 0.15) == {"large"}
    assert apart(loads, dict.fromkeys(loads, 0), 3, 0.0) == set(loads)
    assert apart({}, {}, 3, 0.0) == set()


def test_a_simulation_sends_no_statistics():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    options = {"loss_fn": functional.mse_loss, "optimizer": optimizer, "world_size": 4, "rule": PLAIN}
    kinds = lambda seen: {m.partition(" of ")[0] for event in seen.lane(COMMUNICATION) for m in event.messages}
    local = mkor_fx.simulate(model, *batch_of(0, 0), placement="local", **options)
    assert kinds(local) == {"gradient", "direction", "loss", "norms"}
    assert kinds(mkor_fx.simulate(model, *batch_of(0, 0), placement="owner", **options)) == kinds(local) | {"statistics"}
    assert {one.rank for one in local.inversions} == {0, 1, 2, 3} and {one.send_ms for one in local.inversions} == {0.0}


@pytest.mark.parametrize(
    ("rule", "options", "told"),
    [
        (HyLo(), {}, "HyLo gathers those of all"),
        (PLAIN, {"stale": 1}, "stale=1 is about statistics that cross the network"),
        (PLAIN, {"communication": Communication(statistics_dtype=torch.bfloat16)}, r"\(statistics_dtype\) is about"),
        (PLAIN, {"communication": Communication(speeds=Speeds(latency=0, bandwidth=1, flops=1))}, r"\(speeds\) is about"),
    ],
)
def test_what_does_not_fit_is_refused(rule, options, told):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with pytest.raises(ValueError, match=told):
        mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, placement="local", backend="eager", **options)


@pytest.mark.parametrize(
    ("rule", "options", "told"),
    [
        (PLAIN, {"placement": "owner"}, "placement='owner' needs compile_step"),
        (PLAIN, {"placement": 0.5}, "placement=0.5 needs compile_step"),
        (EKFAC(), {"placement": "local"}, "EKFAC reads it in the backward of every rank"),
        (MKOR.published(), {"placement": "local", "precondition": "backward"}, "precondition='backward' multiplies"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(rule, options, told):
    with pytest.raises(ValueError, match=told):
        mkor_fx.compile(network(), rule, backend="eager", **options)
    assert Options(placement="local").placement == "local"
