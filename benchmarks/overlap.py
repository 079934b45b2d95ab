"""`make overlap`: how long a compiled step waits for the network, as its passes are switched on one by one.

Six linear layers, statistics and gradients reduced at every step. `blocked` is the time spent in waits, the robust figure
on a small, busy machine. Then weak scaling: the same batch a rank on 1 and 2 ranks of plain gloo.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing
from tabulate import tabulate
from torch import nn

import mkor_fx
from benchmarks import latency
from mkor_fx.api import compiled_step
from mkor_fx.options import Options

LAYERS, WIDTH, ROWS = 6, 512, 2048
PLAN = mkor_fx.Communication(gradient_bytes=2 * WIDTH * WIDTH * 4)
#: the passes over collectives that are left out
SIDES = {"trace order": ("schedule", "pin", "bucket"), "scheduled": ("bucket",), "scheduled, in buckets": ()}


def build(
    backend: str, layers: int, width: int, rows: int, without: Sequence[str] = ()
) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = Options(skip_nonfinite=False, backend=backend, communication=PLAN, fullgraph=True, without=without)
    step = compiled_step(model, nn.functional.mse_loss, optimizer, options)
    x, y = torch.randn(rows, width), torch.randn(rows, width)
    return lambda: step(x, y)


def blocked(without: Sequence[str], backend: str = "eager", steps: int = 10) -> dict[str, float]:
    """Medians a step over a group of this rank: milliseconds `communication`, `blocked`, `step`; `collectives`."""
    group = dist.group.WORLD
    assert isinstance(group, latency.LatencyGroup)
    step = build(backend, LAYERS, WIDTH, ROWS, without)
    for _ in range(2):
        step()
    records = []
    for _ in range(steps):
        group.reset()
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        records.append((group.communication * 1e3, group.blocked * 1e3, seconds * 1e3, group.collectives))
    names = ("communication", "blocked", "step", "collectives")
    return dict(zip(names, map(statistics.median, zip(*records))))


def scaled(rank: int, size: int, store: str, backend: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    step, times = build(backend, LAYERS, WIDTH, ROWS), []
    for _ in range(12):
        dist.barrier()
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    if rank == 0:
        torch.save(statistics.median(times[2:]), result)
    dist.destroy_process_group()


def weak_scaling(size: int, backend: str) -> float:
    """Seconds a step, median."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, f"{folder}/store", backend, f"{folder}/result")
        torch.multiprocessing.spawn(scaled, arguments, nprocs=size)
        return torch.load(f"{folder}/result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--latency", type=float, default=4.0, help="milliseconds a collective")
    options = parser.parse_args()
    latency.LATENCY = options.latency / 1e3
    torch.set_num_threads(1)
    dist.init_process_group("latency", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    for name, without in SIDES.items():
        figures = blocked(without, options.backend)
        share = figures["blocked"] / figures["communication"]
        milliseconds = [f"{figures[key]:.1f}" for key in ("communication", "blocked", "step")]
        rows.append([name, int(figures["collectives"]), *milliseconds, f"{share:.0%}"])
    dist.destroy_process_group()
    print(f"gloo and {options.latency:g} ms a collective, 1 rank, 1 thread, {options.backend}")
    headers = ("passes", "collectives", "communication ms", "blocked ms", "step ms", "blocked share")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5)))
    times = {size: weak_scaling(size, options.backend) for size in (1, 2)}
    print(f"\nweak scaling on plain gloo, {ROWS} rows and 1 thread a rank")
    scaling = [[size, f"{t * 1e3:.1f}", f"{times[1] / t:.0%}"] for size, t in times.items()]
    print(tabulate(scaling, ("ranks", "step ms", "efficiency"), disable_numparse=True))


if __name__ == "__main__":
    main()
