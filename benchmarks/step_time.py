"""`make bench`: what MKOR adds to a compiled training step of a small GPT, measured side by side and counted.

The sides take turns within one process, a few steps each, so that what else the machine does hits them alike. CPU time
is that of all threads together; a ratio is the median over the rounds of a side's time over the baseline's in that
round.

N rows of a layer (batch x positions), I inputs, O outputs, T positions, D width.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import mkor_fx
from benchmarks.models import GPT
from benchmarks.tasks import symbol_entropy

VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS, BATCH = 256, 128, 256, 2, 4, 16
SIDES = {"AdamW": 0, "AdamW + MKOR, refresh every step": 1, "AdamW + MKOR, refresh every 10": 10}


def build(refresh_every: int, batch: tuple[torch.Tensor, torch.Tensor], backend: str) -> tuple[Any, float]:
    """A compiled step, plain where `refresh_every` is 0, and the seconds its compilation took."""
    torch.manual_seed(0)
    model = GPT(VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rule = mkor_fx.MKOR() if refresh_every else None
    step = mkor_fx.compile_step(
        model, symbol_entropy, optimizer, rule=rule, refresh_every=refresh_every or 1, backend=backend
    )
    started = time.perf_counter()
    for _ in range(2):  # both variants
        step(*batch)
    return step, time.perf_counter() - started


def measure(steps: dict[str, Any], batch: tuple[torch.Tensor, torch.Tensor], rounds: int, length: int) -> list[dict]:
    """(CPU, wall) seconds a step of every side, for each round of `length` steps a side."""
    records = []
    for _ in range(rounds):
        record = {}
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(length):
                loss = step(*batch)
            loss.item()  # waits for the device, where there is one
            record[name] = ((time.process_time() - cpu) / length, (time.perf_counter() - wall) / length)
        records.append(record)
    return records


def timings(records: list[dict], compile_seconds: dict[str, float]) -> str:
    """Median milliseconds a step and the ratios to the first side."""
    baseline = next(iter(records[0]))
    rows = []
    for name in records[0]:
        row = [name]
        for clock in (0, 1):
            row.append(f"{1e3 * statistics.median(record[name][clock] for record in records):.1f}")
            ratio = statistics.median(record[name][clock] / record[baseline][clock] for record in records)
            row.append(f"{ratio:.3f}")
        rows.append((*row, f"{compile_seconds[name]:.0f}"))
    headers = ("compiled step", "CPU ms", "ratio", "wall ms", "ratio", "compile s")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 5)


def counts() -> str:
    """Multiply-adds a step of every layer, its preconditioning in the cheaper order, and its factors' size."""
    n = BATCH * CONTEXT
    attention = 3 * 2 * DEPTH * n * CONTEXT * WIDTH  # forward and twice that backward, of scores and mixtures
    shapes, training, preconditioning, factors = {"attention": ""}, [attention], [0], [0]
    for name, layer in GPT(VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS).named_modules():
        if isinstance(layer, nn.Linear):
            o, i = layer.weight.shape
            product_first = o * i * (o + i)  # L (g'a) R
            operands_first = n * (o * o + i * i)  # (g L)'(a R); the last product replaces the gradient's
            shapes[name] = f"{o} x {i}"
            training.append(3 * n * o * i)
            preconditioning.append(min(product_first, operands_first))
            factors.append(4 * (o * o + i * i))
        elif isinstance(layer, nn.Embedding):  # looked up, and with one factor
            rows_of_table, width = layer.weight.shape
            shapes[name] = f"{width} x {rows_of_table}"
            training.append(0)
            preconditioning.append(rows_of_table * width**2)
            factors.append(4 * width**2)
    shapes["total"] = ""
    for column in (training, preconditioning, factors):
        column.append(sum(column))
    rows = [
        (name, shape, f"{train / 1e6:,.0f}", f"{extra / 1e6:,.0f}", f"{size / 2**20:.2f}")
        for (name, shape), train, extra, size in zip(shapes.items(), training, preconditioning, factors)
    ]
    headers = ("layer", "O x I", "forward + backward, M", "preconditioning, M", "factors, MiB")
    counted = tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 4)
    return (
        f"{counted}\n\nCounted floor of the ratio: {1 + preconditioning[-1] / training[-1]:.3f} in multiply-adds. "
        f"A refresh also reads the factors twice and writes them once: {3 * factors[-1] / 2**20:.0f} MiB of traffic."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=10, help="steps a side and round; a multiple of 10 is fair")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    print(f"GPT, {DEPTH} blocks, width {WIDTH}, {BATCH} x {CONTEXT} symbols, {torch.get_num_threads()} threads\n")
    print(counts(), flush=True)
    steps, compile_seconds = {}, {}
    for name, refresh_every in SIDES.items():
        steps[name], compile_seconds[name] = build(refresh_every, batch, options.backend)
    print(f"\n{timings(measure(steps, batch, options.rounds, options.length), compile_seconds)}")


if __name__ == "__main__":
    main()
