"""What a step costs: a plain compiled step, torch's Muon, MKOR and others, side by side in one process.

    python -m benchmarks.step_time --model gpt --width 256 --depth 4
    python -m benchmarks.step_time --model mlp --side SGD --side MKOR
    python -m benchmarks.step_time --all
    python -m benchmarks.step_time --device cuda --width 1024 --depth 8 --batch 64

Prints medians over rounds of CPU and wall milliseconds a step, their ratios to the first side, and for MKOR what the step
cannot cost less than: that of the plain one and the floor of what MKOR adds, by CPU time, on a GPU by wall time.
`compiled` sides are one program a step.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate

import mkor_fx
from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.floor import counts, floor
from benchmarks.step_sides import SEED, SIDES, Step

USUAL = ("AdamW", "SGD", "Muon + AdamW", "MKOR", "MKOR, never refreshed")
#: whose difference is what a stage costs
STAGES = ("AdamW", "MKOR, never refreshed", "MKOR")
#: CPU and wall seconds a step by side, for one round
Record = dict[str, tuple[float, float]]


def compile_seconds(step: Step) -> float:
    """Of the programs with and without a refresh, compiled by running them."""
    began = time.perf_counter()
    for _ in range(2):
        step()
    return time.perf_counter() - began


def measure(steps: dict[str, Step], rounds: int, length: int) -> list[Record]:
    """(CPU, wall) seconds a step of every side, for each round of `length` steps a side."""
    records = []
    for _ in range(rounds):
        record = {}
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(length):
                loss = step()
            loss.item()  # waits for the device, where there is one
            record[name] = ((time.process_time() - cpu) / length, (time.perf_counter() - wall) / length)
        records.append(record)
    return records


def ratio(records: Sequence[Record], side: str, to: str, clock: int = 0) -> float:
    """Median over rounds."""
    return statistics.median(record[side][clock] / record[to][clock] for record in records)


def cpu_seconds(records: Sequence[Record], side: str) -> float:
    return seconds(records, side, 0)


def seconds(records: Sequence[Record], side: str, clock: int) -> float:
    """Of CPU (0) or wall (1), median over rounds."""
    return statistics.median(record[side][clock] for record in records)


def timings(records: Sequence[Record], compiled_in: dict[str, float]) -> str:
    """Median milliseconds a step and the ratios to the first side."""
    baseline, rows = next(iter(records[0])), []
    places = 1 if min(seconds(records, name, 1) for name in records[0]) > 0.01 else 2
    for name in records[0]:
        row = [name]
        for clock in (0, 1):
            row.append(f"{1e3 * seconds(records, name, clock):.{places}f}")
            row.append(f"{ratio(records, name, baseline, clock):.3f}")
        rows.append((*row, f"{compiled_in[name]:.0f}"))
    headers = ("step", "CPU ms", "ratio", "wall ms", "ratio", "compile s")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) + ("right",) * 5)


def against_floor(case: Case, records: Sequence[Record]) -> str:
    """What the plain step costs and MKOR adds at least, and what MKOR's step costs over their sum."""
    plain, clock = "SGD" if "SGD" in records[0] else "AdamW", clock_of(case)
    lines = []
    for side, rule in (("MKOR", mkor_fx.MKOR()), ("MKOR, products in float32", mkor_fx.MKOR(product_dtype=None))):
        if side in records[0] and plain in records[0]:
            added = floor(case, rule)
            own = seconds(records, plain, clock)
            lines.append(
                f"{side}: {plain} {1e3 * own:.1f} ms, floor of what is added {added}; "
                f"measured over their sum {seconds(records, side, clock) / (own + added.total):.2f}"
            )
    return "\n".join(lines)


def clock_of(case: Case) -> int:
    return 0 if case.batch[0].device.type == "cpu" else 1


def shares(case: Case, records: Sequence[Record]) -> str:
    """Of MKOR's step, by differences between sides."""
    if not all(side in records[0] for side in STAGES):
        return ""
    plain, still, whole = (seconds(records, side, clock_of(case)) for side in STAGES)
    parts = {"forward, backward, AdamW": plain, "momentum, products, size": still - plain}
    parts["statistics, factors"] = whole - still
    return "Share of MKOR's step: " + ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.items())


def run(case: Case, sides: Sequence[str], rounds: int, length: int, backend: str) -> list[Record]:
    """Prints everything about one case."""
    print(f"\n## {case.title}\n\n{counts(case)}\n", flush=True)
    steps, compiled_in = {}, {}
    for name in sides:
        steps[name] = SIDES[name](case, backend)
        compiled_in[name] = compile_seconds(steps[name])
    records = measure(steps, rounds, length)
    parts = timings(records, compiled_in), shares(case, records), against_floor(case, records)
    print("\n\n".join(part for part in parts if part), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt", "mlp", "cnn"), default="gpt")
    parser.add_argument("--width", type=int, default=256, help="of the GPT")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the GPT")
    parser.add_argument("--batch", type=int, default=16, help="sequences of the GPT")
    parser.add_argument("--side", action="append", choices=SIDES, help=f"default: {', '.join(USUAL)}")
    parser.add_argument("--all", action="store_true", help="every side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=10, help="steps a side and round; a multiple of 10 is fair")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--float32", default="highest", choices=("highest", "high"), help="precision of its products")
    options = parser.parse_args()
    torch.set_float32_matmul_precision(options.float32)

    build = {"gpt": lambda: cases.gpt(options.width, options.depth, options.batch), "mlp": cases.mlp, "cnn": cases.cnn}
    device = "" if options.device.type == "cpu" else f"{torch.cuda.get_device_name(options.device)}, "
    print(f"torch {torch.__version__}, {device}{torch.get_num_threads()} threads, seed {SEED}, {options.rounds} rounds of "
          f"{options.length} steps, {options.backend}, precision of float32 {options.float32}")  # fmt: skip
    sides = tuple(SIDES) if options.all else options.side or USUAL
    run(build[options.model]().on(options.device), sides, options.rounds, options.length, options.backend)


if __name__ == "__main__":
    main()
