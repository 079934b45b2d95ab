"""Ranks that do not fit together end with an error that says so, all of them, and soon."""

import os
import re
import time

import processes
import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import Communication


def prepare(hidden=6, lr=0.1, **options):
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return mkor_fx.compile_step(model, functional.mse_loss, optimizer, backend="eager", **options)


BATCH = (torch.ones(5, 4), torch.zeros(5, 3))

DIFFERENCES = {
    "shapes": ({"hidden": 7}, "0.weight [7, 4]"),
    "coverage": ({"skip": "2.*"}, "skipped by pattern"),
    "refresh_every": ({"refresh_every": 3}, "refresh_every 3"),
    "learning rate": ({"lr": 0.2}, "lr of group 0: 0.2"),
}


def differ(rank, size, what):
    options, _ = DIFFERENCES[what]
    prepare(**(options if rank == size - 1 else {}))(*BATCH)


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_rank_that_would_run_something_else(what):
    for error in processes.errors(differ, 2, what):
        assert "ValueError: ranks would run different steps" in error
        assert "rank 1 has" in error and DIFFERENCES[what][1] in error


def die(rank, size):
    step = prepare()
    step(*BATCH)
    if rank == 1:
        os._exit(3)
    for _ in range(100):
        step(*BATCH)


def test_a_rank_that_dies():
    start = time.monotonic()
    first, second = processes.run(die, 2, patience=120)
    assert second == processes.Outcome(exitcode=3)
    assert "RuntimeError" in first.error and "gloo" in first.error  # what torch says of a lost connection
    assert time.monotonic() - start < 100


def come_once(rank, size):
    step = prepare()
    if rank == 0:
        step(*BATCH)


def test_a_step_on_some_ranks_only():
    first, _ = processes.run(come_once, 2, patience=4)
    assert "RuntimeError: rank 0 waited 0:00:04 for rank 1, which has not compiled this step" in first.error


def stop_early(rank, size):
    step = prepare()
    for _ in range(3 if rank == 0 else 1):
        step(*BATCH)
    if rank == 1:
        time.sleep(8)


def test_a_rank_that_stops_stepping():
    first, _ = processes.run(stop_early, 2, patience=4)
    assert re.search("[Tt]imeout|[Tt]imed out", first.error)


def fail_to_compile(rank, size):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = functional.mse_loss if rank == 0 else (lambda x, y: x - y)
    mkor_fx.compile_step(model, loss, optimizer, backend="eager")(*BATCH)


def test_a_rank_that_fails_before_the_first_step():
    first, second = processes.errors(fail_to_compile, 2)
    assert "the loss has shape (5, 3)" in second
    assert "RuntimeError: rank 1 failed first: ValueError: the loss has shape (5, 3)" in first


def load_on_one(rank, size):
    step = prepare()
    step(*BATCH)
    state = step.mkor.state_dict()
    other = prepare()
    if rank == 1:
        other.mkor.load_state_dict(state)
    other(*BATCH)


def test_factors_loaded_on_one_rank_only():
    for error in processes.errors(load_on_one, 2):
        assert "ranks would run different steps" in error and "rank 1 has" in error


def other_optimizer_state(rank, size):
    step = prepare()
    step.prepare_optimizer(list(step.model.parameters()))
    step.optimizer.state[step.model[2].weight]["exp_avg"].add_(rank)
    step(*BATCH)


def test_optimizer_state_that_differs():
    for error in processes.errors(other_optimizer_state, 2):
        assert "replicas differ before step 0: optimizer state exp_avg of 2.weight of rank 1" in error


def drift(rank, size):
    step = prepare(communication=Communication(check_replicas_every=2))
    for i in range(8):
        if i == 3 and rank == 1:
            with torch.no_grad():
                step.model[2].weight[0, 0] += 1e-7
        step(*BATCH)


def test_replicas_that_drift_apart():
    for error in processes.errors(drift, 2):
        assert "replicas differ before step 4" in error and "rank 1 is not rank 0's" in error


def initialise_late(rank, size, path):
    torch.distributed.destroy_process_group()
    step = prepare()
    store = torch.distributed.FileStore(path, size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.distributed.barrier()  # else one rank's error can close what the other still connects to
    step(*BATCH)


def test_a_process_group_that_comes_too_late(tmp_path):
    for error in processes.errors(initialise_late, 2, str(tmp_path / "late")):
        assert "initialised after mkor_fx was called" in error


@pytest.mark.parametrize("option", [{"statistics_bytes": 0}, {"gradient_bytes": 1.5}, {"average": "mean"},
                                    {"check_replicas_every": -1}, {"statistics_dtype": torch.int8}], ids=str)  # fmt: skip
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Communication(**option)


def test_a_group_that_is_none():
    with pytest.raises(ValueError, match="process_group"):
        prepare(process_group="world")
