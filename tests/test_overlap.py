"""Communication hides under compute: time blocked in waits, over a process group with a slow network's latency."""

import processes
import pytest
import torch
import torch.distributed as dist


def measure(rank, size):
    from benchmarks import overlap

    dist.destroy_process_group()
    dist.init_process_group("latency", store=dist.HashStore(), rank=0, world_size=1)
    return {name: overlap.blocked(on, "eager", steps=5) for name, on in overlap.SIDES.items()}


def test_communication_hides_under_compute():
    (sides,) = processes.values(measure, 1)
    for figures in sides.values():
        assert figures["communication"] >= 4 * figures["collectives"]
    trace, scheduled, bucketed = sides.values()
    assert trace["blocked"] >= 0.8 * trace["communication"]  # each is awaited as soon as it is issued
    assert scheduled["blocked"] < 0.5 * trace["blocked"]
    assert bucketed["collectives"] < scheduled["collectives"]
    assert bucketed["blocked"] <= 0.1 * bucketed["communication"]


def latencies(rank, size):
    from benchmarks import latency

    dist.destroy_process_group()
    dist.init_process_group("latency", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    x = torch.arange(3.0)
    functional = torch.ops._c10d_functional
    started = [functional.all_reduce(x, "sum", group.group_name) for _ in range(3)]
    results = [functional.wait_tensor(one) for one in started]
    return results, group.blocked, group.collectives, latency.LATENCY


def test_the_slow_network_delivers_one_after_the_other():
    ((results, blocked, collectives, latency),) = processes.values(latencies, 1)
    assert all(torch.equal(result, torch.arange(3.0)) for result in results)
    assert collectives == 3 and blocked == pytest.approx(3 * latency, rel=0.5)
