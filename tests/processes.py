"""Runs a function in several processes, each a rank of a gloo group. None outlives the call, whatever happens.

`run(function, size, *args)` calls `function(rank, size, *args)` and returns the ranks' outcomes. Processes fork from a
server that has imported torch and compiled already.
"""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torch._inductor.compile_fx", "torch.distributed", "tests.warm"])


@dataclass
class Outcome:
    """`value` is what the function returned; or `error` its traceback; or neither: it ended with `exitcode`."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def run(function, size, *args, timeout=240, patience=60):
    """`timeout`: seconds until all must have ended. `patience`: the process group's own timeout, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            call = (function, rank, size, args, os.path.join(folder, "store"), patience, sender)
            process = context.Process(target=_rank, args=call, daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        deadline = time.monotonic() + timeout
        try:
            return [_outcome(process, receiver, deadline, rank) for rank, (process, receiver) in enumerate(ranks)]
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def values(function, size, *args, **options):
    """As `run`, for functions that succeed: their values."""
    outcomes = run(function, size, *args, **options)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}:\n{outcome.error}"
        assert outcome.exitcode is None, f"rank {rank} ended with {outcome.exitcode}"
    return [outcome.value for outcome in outcomes]


def errors(function, size, *args, **options):
    """As `run`, for functions that fail on every rank: their errors."""
    outcomes = run(function, size, *args, **options)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is not None, f"rank {rank} did not fail: {outcome}"
    return [outcome.error for outcome in outcomes]


def _outcome(process, receiver, deadline, rank):
    if not receiver.poll(max(0, deadline - time.monotonic())):
        raise TimeoutError(f"rank {rank} hangs")
    try:
        kind, packed = receiver.recv()
    except EOFError:
        process.join(10)
        return Outcome(exitcode=process.exitcode)
    return Outcome(**{kind: torch.load(io.BytesIO(packed), weights_only=False)})


def _rank(function, rank, size, args, store, patience, sender):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=patience)}
        dist.init_process_group("gloo", init_method=f"file://{store}", **options)
        result = "value", function(rank, size, *args)
    except BaseException:
        result = "error", traceback.format_exc()
    packed = io.BytesIO()
    torch.save(result[1], packed)
    sender.send((result[0], packed.getvalue()))
    sender.close()
    os._exit(0)  # whatever waits in a collective for a rank that is gone is not waited for
