"""What a compiled step costs: AdamW, torch's Muon and MKOR, side by side in one process.

    python -m benchmarks.step_time --width 256 --depth 4
    python -m benchmarks.step_time --model mlp

Prints medians over rounds of CPU and wall milliseconds a step, their ratios to the first side, and the counted floor. Muon
steps the hidden matrices, AdamW the rest, in one compiled program like the other sides; MKOR takes the head as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional

import mkor_fx
from benchmarks import models
from benchmarks.models import GPT
from benchmarks.tasks import symbol_entropy
from benchmarks.training import muon_for

VOCABULARY, CONTEXT, HEADS, BATCH = 256, 128, 4, 16
ADAMW, MUON, LEFT = "AdamW", "Muon + AdamW", "MKOR.hybrid(), first order"
RULES: dict[str, tuple[Any, int]] = {
    "MKOR": (mkor_fx.MKOR(), 1),
    "MKOR, products in float32": (mkor_fx.MKOR(product_dtype=None), 1),
    "MKOR, refresh every 10": (mkor_fx.MKOR(), 10),
    "MKOR.published()": (mkor_fx.MKOR.published(), 1),
    LEFT: (mkor_fx.MKOR.hybrid(), 1),
}


class Case(NamedTuple):
    """What is trained, and on what; ``rows`` is how many its layers see, ``attention`` multiply-adds without weights."""

    title: str
    model: Callable[[], nn.Module]
    loss_fn: Callable[..., torch.Tensor]
    batch: tuple[torch.Tensor, torch.Tensor]
    rows: int
    attention: int = 0


def gpt(width: int, depth: int) -> Case:
    text = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    rows = BATCH * CONTEXT
    attention = 3 * 2 * depth * rows * CONTEXT * width  # forward and twice that backward, of scores and mixtures
    title = f"GPT, {depth} blocks, width {width}, {BATCH} x {CONTEXT} symbols"
    return Case(title, lambda: GPT(VOCABULARY, CONTEXT, width, depth, HEADS), symbol_entropy, batch, rows, attention)


def mlp() -> Case:
    generator = torch.Generator().manual_seed(0)
    sizes, batch = (784, 1024, 1024, 1024, 10), 256

    data = torch.randn(batch, 784, generator=generator), torch.randint(10, (batch,), generator=generator)
    title = f"MLP {'-'.join(map(str, sizes))}, {batch} rows"
    return Case(title, lambda: models.mlp(*sizes), functional.cross_entropy, data, batch)


def hidden_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those whose weights Muon is for: a language model's head is not among them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"}


def build(side: str, case: Case, backend: str) -> tuple[Any, float]:
    """A compiled step and the seconds its compilation took."""
    torch.manual_seed(0)
    model = case.model()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    if side == MUON:
        optimizers = muon_for(model, [layer.weight for layer in hidden_layers(model).values()])
    rule, every = RULES.get(side, (None, 1))
    step = mkor_fx.compile_step(model, case.loss_fn, optimizers, rule=rule, refresh_every=every, backend=backend)
    if side == LEFT:
        assert step.mkor.switch is not None
        step.mkor.switch.trend = step.mkor.switch.trend._replace(first_order=1.0)
    return step, compile_seconds(step, case)


def compile_seconds(step: Any, case: Case) -> float:
    """Of the programs with and without a refresh, compiled by running them."""
    started = time.perf_counter()
    for _ in range(2):
        step(*case.batch)
    return time.perf_counter() - started


def measure(steps: dict[str, Any], case: Case, rounds: int, length: int) -> list[dict]:
    """(CPU, wall) seconds a step of every side, for each round of `length` steps a side."""
    records = []
    for _ in range(rounds):
        record = {}
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(length):
                loss = step(*case.batch)
            loss.item()  # waits for the device, where there is one
            record[name] = ((time.process_time() - cpu) / length, (time.perf_counter() - wall) / length)
        records.append(record)
    return records


def timings(records: list[dict], compiled_in: dict[str, float]) -> str:
    """Median milliseconds a step and the ratios to the first side."""
    baseline = next(iter(records[0]))
    rows = []
    for name in records[0]:
        row = [name]
        for clock in (0, 1):
            row.append(f"{1e3 * statistics.median(record[name][clock] for record in records):.1f}")
            ratio = statistics.median(record[name][clock] / record[baseline][clock] for record in records)
            row.append(f"{ratio:.3f}")
        rows.append((*row, f"{compiled_in[name]:.0f}"))
    headers = ("compiled step", "CPU ms", "ratio", "wall ms", "ratio", "compile s")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 5)


def counts(case: Case) -> str:
    """Multiply-adds a step of every layer, what MKOR and Muon add to them, and the size of MKOR's factors."""
    table: list[tuple[str, str, int, int, int, int]] = [("attention", "", case.attention, 0, 0, 0)]
    model = case.model()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            o, i = layer.weight.shape
            small, large = sorted((o, i))
            muon = 5 * (2 * small * small * large + small**3)  # X X^T, its square, and a product with X, five times
            muon *= name in hidden_layers(model)
            table.append((name, f"{o} x {i}", 3 * case.rows * o * i, o * i * (o + i), muon, 4 * (o * o + i * i)))
    totals = [sum(column) for column in zip(*(row[2:] for row in table))]
    table.append(("total", "", totals[0], totals[1], totals[2], totals[3]))
    rows = [(*row[:2], *(f"{n / 1e6:,.0f}" for n in row[2:5]), f"{row[5] / 2**20:.2f}") for row in table]
    headers = ("layer", "O x I", "forward + backward, M", "MKOR, M", "Muon, M", "factors, MiB")
    counted = tabulate(rows, headers, disable_numparse=True, colalign=("left", "left") + ("right",) * 4)
    return (
        f"{counted}\n\nCounted floor of the ratio, in multiply-adds: MKOR {1 + totals[1] / totals[0]:.3f}, Muon "
        f"{1 + totals[2] / totals[0]:.3f}. A refresh also reads the factors twice and writes them once: "
        f"{3 * totals[3] / 2**20:.0f} MiB of traffic."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt", "mlp"), default="gpt")
    parser.add_argument("--width", type=int, default=256, help="of the GPT")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the GPT")
    parser.add_argument("--side", action="append", choices=(MUON, *RULES), help="beside AdamW (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=10, help="steps a side and round; a multiple of 10 is fair")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    options = parser.parse_args()

    case = gpt(options.width, options.depth) if options.model == "gpt" else mlp()
    print(f"{case.title}, {torch.get_num_threads()} threads\n\n{counts(case)}", flush=True)
    steps, compiled_in = {}, {}
    for name in (ADAMW, *(options.side or (MUON, *RULES))):
        steps[name], compiled_in[name] = build(name, case, options.backend)
    print(f"\n{timings(measure(steps, case, options.rounds, options.length), compiled_in)}")


if __name__ == "__main__":
    main()
