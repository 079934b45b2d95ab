"""Speeds of ranks and network decide which statistics travel together and who derives what (SPD-KFAC)."""

import itertools
import math

import processes
import pytest
import torch
import torch.distributed as dist
from test_distributed import assert_bitwise
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, Communication, Speeds
from mkor_fx.passes.order.fusion import Arrival, fuse
from mkor_fx.runtime.speeds import DerivedSizes, workers
from mkor_fx.show.timeline import COMMUNICATION


def speeds(latency=1.0, bandwidth=math.inf, flops=1e12, **more):
    return Speeds(latency=latency, bandwidth=bandwidth, flops=flops, **more)


# ---- which statistics travel together ---------------------------------------------------------------------------------


def arrivals(times, sizes):
    return [Arrival(at, size) for at, size in zip(itertools.accumulate(times), sizes, strict=True)]


def by_the_equations(ready, sizes, alpha, beta):
    """The groups, written down once more: merged messages cost nothing, and all starts are computed anew after each
    merge."""
    n, merged = list(map(float, sizes)), set()
    for last in range(len(n) - 1):
        start = 0.0
        for at in range(last + 1):
            before = 0.0 if at == 0 or at - 1 in merged else alpha + beta * n[at - 1]
            start = ready[0] if at == 0 else max(start + before, ready[at])
        if ready[last + 1] < start + alpha:
            n[last + 1], n[last] = n[last + 1] + n[last], 0.0
            merged.add(last)
    groups = [[]]
    for at in range(len(n)):
        groups[-1].append(at)
        if at not in merged and at + 1 < len(n):
            groups.append([])
    return groups


def end_of(groups, ready, sizes, alpha, beta):
    free = 0.0
    for group in groups:
        free = max(free, ready[group[-1]]) + alpha + beta * sum(sizes[at] for at in group)
    return free


def test_without_latency_only_a_backlog_is_merged():
    """At 1 byte a second: the first is under way until 4, in front of it the second waits alone, then the third joins it."""
    times, sizes = [1, 1, 1, 4], [3, 5, 2, 1]
    groups = fuse(arrivals(times, sizes), speeds(0.0, 1.0))
    assert groups == [[0], [1, 2], [3]]
    assert fuse(arrivals([1, 3, 3], [3, 3, 3]), speeds(0.0, 1.0)) == [[0], [1], [2]]


@pytest.mark.parametrize(("time", "groups"), [(0.9, 1), (1.1, 12)])
def test_where_size_costs_nothing_a_start_up_decides(time, groups):
    assert len(fuse(arrivals([time] * 12, [7] * 12), speeds(1.0))) == groups


def test_groups_follow_the_equations_and_end_no_later():
    generator = torch.Generator().manual_seed(0)
    saved = 0
    for case in range(200):
        times = torch.rand(9, generator=generator).mul(2).tolist()
        sizes = torch.randint(1, 9, (9,), generator=generator).tolist()
        alpha, beta = torch.rand(2, generator=generator).tolist()
        found = arrivals(times, sizes)
        ready = [one.ready for one in found]
        groups = fuse(found, speeds(alpha, 1 / beta))
        assert groups == by_the_equations(ready, sizes, alpha, beta), case
        single = end_of([[at] for at in range(9)], ready, sizes, alpha, beta)
        assert end_of(groups, ready, sizes, alpha, beta) <= single + 1e-9
        saved += end_of(groups, ready, sizes, alpha, beta) < single - 1e-3
    assert saved > 100


def test_other_dtypes_and_phases_do_not_join():
    found = [Arrival(0.0, 1, "float32"), Arrival(0.0, 1, "float32"), Arrival(0.0, 1, "bfloat16")]
    assert fuse(found, speeds()) == [[0, 1], [2]]
    assert fuse([], speeds()) == []


def deep(width=24, depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())))


def simulated(**options):
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 24)
    options = {"rule": KFAC(derive_every=2), "world_size": 4, **options}
    return mkor_fx.simulate(model, x, x, loss_fn=functional.mse_loss, optimizer=optimizer, **options)


def statistics_in(simulation):
    sent = [e.messages for e in simulation.lane(COMMUNICATION) if any(m.startswith("statistics") for m in e.messages)]
    return [[m for m in messages if m.startswith("statistics")] for messages in sent]


def test_the_schedule_follows_the_speeds():
    """24 x 24 factors of four layers: of inputs, made in the forward, of outputs with the number of rows, in the
    backward."""
    apart = statistics_in(simulated(communication=Communication(speeds=speeds(0.0, math.inf))))
    together = statistics_in(simulated(communication=Communication(speeds=speeds(1.0))))
    assert sorted(map(len, apart)) == [1] * len(apart) and len(apart) >= 8
    assert len(together) == 2 and sum(map(len, together)) == len(apart)
    products = [f"statistics of {2 * layer}.weight [576]" for layer in range(4)]
    forward, backward = together
    assert forward == products and [m for m in backward if "[576]" in m] == products[::-1]


# ---- who derives what -------------------------------------------------------------------------------------------------


def test_what_is_cheaper_to_derive_than_to_send_is_never_sent():
    """d^3 at 1 flop/s against 1000 s a broadcast: up to 10 rows on every rank."""
    fast = speeds(1000.0, flops=1.0)
    weights = {str(d): DerivedSizes((d,), (4 * d * d,)) for d in (2, 9, 10, 11, 30)}
    found = workers(weights, 4, fast)
    assert {name for name, rank in found.items() if rank is None} == {"2", "9"}  # 10^3 s is not less
    assert found["30"] == 0 and {found["11"], found["10"]} == {1, 2}
    assert set(workers(weights, 1).values()) == {None} and None not in workers(weights, 4).values()


def test_the_longest_goes_first_and_to_whoever_has_least():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randint(2, 20, (7,), generator=generator).tolist()
        weights = {str(i): DerivedSizes((d,), (1,)) for i, d in enumerate(rows)}
        for given, cost in ((None, lambda d: d**3), (speeds(0.0, flops=1.0, inversion_latency=500.0), lambda d: 500 + d**3)):
            found = workers(weights, 3, given)
            work = [cost(d) for d in rows]
            load = lambda at, work=work: max(sum(work[i] for i in range(7) if at[i] == rank) for rank in range(3))
            best = min(load(at) for at in itertools.product(range(3), repeat=7))
            assert load([found[str(i)] for i in range(7)]) <= best * (4 / 3 - 1 / 9) + 1e-9  # Graham, 1969


def derive_in_turn(rank, size, door, latency):
    """How many this rank derives and how many numbers are broadcast at each of five steps, and the factors at the end."""
    done = []
    derive = lambda self, state: done.append(1) or KFAC.derive(self, state)
    rule = type("Counted", (KFAC,), {"derive": derive})(derive_every=2)
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"communication": Communication(speeds=speeds(latency, flops=1e9)), "backend": "eager"}
    if door == "step":
        step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, **given)
        mkor = step.mkor
    else:
        compiled = mkor_fx.compile(model, rule, **given)
        mkor = compiled.mkor

        def step(x, y):
            optimizer.zero_grad()
            functional.mse_loss(compiled(x), y).backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= size
            optimizer.step()

    counts, broadcast, sent = [], dist.broadcast, []
    dist.broadcast = lambda t, **options: sent.append(t.numel()) or broadcast(t, **options)
    for i in range(5):
        done.clear()
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * i + rank))
        step(x, x.flip(0))
        counts.append((len(done), sum(sent) if i else 0))
        sent.clear()
    return counts, {**mkor.state_dict(), **model.state_dict()}


@pytest.mark.parametrize("door", ["step", "loop"])
def test_ranks_share_what_is_worth_sending(door):
    """Four layers, two inverses of 24 rows each: 27.6 us at 1 Gflop/s, against two broadcasts."""
    every = processes.values(derive_in_turn, 2, door, 1.0)
    for counts, _ in every:
        assert counts == [(4, 0), (0, 0), (4, 0), (0, 0), (4, 0)]
    shared = processes.values(derive_in_turn, 2, door, 1e-6)
    for counts, _ in shared:
        assert counts == [(4, 0), (0, 0), (2, 4 * 2 * 576), (0, 0), (2, 4 * 2 * 576)]
    assert_bitwise([state for _, state in (*every, *shared)])


@pytest.mark.parametrize("placement", ["replicated", "owner", 0.5])
def test_a_simulation_shows_who_derives(placement):
    communication = Communication(speeds=speeds(1e-6, 1e12, flops=1e9), padding=9.0)
    seen = simulated(placement=placement, communication=communication)
    assert [one.name for one in seen.inversions] == [f"{2 * i}.weight" for i in range(4)]
    assert {(one.rows, one.every) for one in seen.inversions} == {((24, 24), 2)}
    assert {one.rank for one in seen.inversions} == {0, 1, 2, 3}
    assert all(one.derive_ms == pytest.approx(1e3 * 2 * 24**3 / 1e9) for one in seen.inversions)
    sends = 0.0 if placement == "owner" else 2e3 * (1e-6 + 4 * 576 / 1e12)
    assert all(one.send_ms == pytest.approx(sends) for one in seen.inversions)
    assert seen.inversion_ms() == pytest.approx(dict.fromkeys(range(4), 1e3 * 2 * 24**3 / 1e9))


def test_a_simulation_shows_what_every_rank_derives():
    seen = simulated(communication=Communication(speeds=speeds(1.0)))
    assert {one.rank for one in seen.inversions} == {None} and {one.send_ms for one in seen.inversions} == {0.0}
    assert "every rank" in str(seen)
    assert simulated(rule=mkor_fx.Eva()).inversions == ()


# ---- what is given ----------------------------------------------------------------------------------------------------


def test_a_line_through_what_was_measured():
    latency, bandwidth = Speeds.line([1e3, 1e6, 1e7], [2e-3 + size / 5e9 for size in (1e3, 1e6, 1e7)])
    assert (latency, bandwidth) == (pytest.approx(2e-3), pytest.approx(5e9))
    with pytest.raises(ValueError, match="at least two sizes"):
        Speeds.line([1.0, 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="do not grow"):
        Speeds.line([1.0, 2.0], [2.0, 1.0])


@pytest.mark.parametrize(
    "wrong", [{"latency": -1.0}, {"latency": math.inf}, {"bandwidth": 0}, {"flops": math.nan}, {"flops": True},
              {"inversion_flops": 0.0}, {"inversion_latency": None}, {"broadcast_bandwidth": "fast"}]
)  # fmt: skip
def test_speeds_outside_their_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"Speeds\({name}="):
        speeds(**wrong)


def test_speeds_stand_in_for_sizes_of_buckets():
    with pytest.raises(ValueError, match="speeds decide what travels together"):
        Communication(speeds=speeds(), statistics_bytes=1 << 10)
    with pytest.raises(ValueError, match=r"Communication\(speeds=3\): must be a mkor_fx.Speeds"):
        Communication(speeds=3)
