"""Learning-rate sweep: each side at the best rate of one grid, over seeds; and a study of MKOR's options.

    python -m benchmarks.sweep --task digits --rule Muon --rule "MKOR()" --rule "MKOR(kappa=30.0) every 2"
    python -m benchmarks.sweep --study --seeds 0 1

Every finished run is appended to a JSONL file and never repeated, so a sweep that was cut goes on where it stopped. Use
another `--out`, or remove the file, after the library or a task has changed.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tabulate import tabulate

import mkor_fx
from benchmarks.tasks import TASKS
from benchmarks.training import MuonTrainer, Run, Trainer

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
BASELINE = "AdamW"  # every other side is a rule in front of it, or
MUON = "Muon"  # for the hidden matrices, with AdamW for the rest
STUDY_TASKS = ("digits", "fashion", "fashion-ae")
STUDY = (
    "MKOR()",
    "MKOR() every 2",
    "MKOR() every 5",
    "MKOR.published()",
    'MKOR.published(form="forgetful")',
    'MKOR.published(form="exact", epsilon=1000.0, zeta=0.9)',
    'MKOR.published(statistic="mean+gradient")',
    "MKOR(rank=1)",
    "MKOR(rank=2)",
    "MKOR(rank=16)",
    'MKOR(statistic="gradient", rank=4)',
    'MKOR(statistic="rows+gradient", rank=4)',
    "MKOR(kappa=3.0)",
    "MKOR(kappa=30.0)",
    "MKOR(gamma=0.95)",
    "MKOR(gamma=0.995)",
    "MKOR(momentum=0.9)",
    "MKOR(nesterov=False)",
    'MKOR(bias="left")',
    "MKOR(factor_dtype=torch.bfloat16)",
    "MKOR(product_dtype=torch.bfloat16)",
)


class Ledger:
    """The finished runs, keyed by what was run, in a JSONL file with a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = {tuple(entry["key"]): Run(**entry["run"]) for entry in map(json.loads, lines)}

    def add(self, key: tuple, run: Run) -> None:
        self.runs[key] = run
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "run": asdict(run)}) + "\n")


def build(task: str, side: str, backend: str) -> Trainer:
    """The trainer of a side: `AdamW`, `Muon`, or a rule written as Python, with `every n` where it refreshes less often."""
    if side == BASELINE:
        return Trainer(TASKS[task], backend=backend)
    if side == MUON:
        return MuonTrainer(TASKS[task], backend=backend)
    source, _, every = side.partition(" every ")
    rule = eval(source, {"torch": torch, **vars(mkor_fx)})  # the command line is the user's own Python
    return Trainer(TASKS[task], rule, refresh_every=int(every or 1), backend=backend)


def sweep(ledger: Ledger, task: str, side: str, options: argparse.Namespace) -> list[Run]:
    """All runs of one side; what the ledger holds already is not run again."""
    steps = options.steps or TASKS[task].steps
    trainer, runs = None, []
    for seed in options.seeds:
        for lr in options.rates:
            key = (task, side, steps, lr, seed)
            if key not in ledger.runs:
                if trainer is None:
                    trainer = build(task, side, options.backend)
                    print(f"{task} | {side}: compiled in {trainer.compile_seconds:.0f} s", flush=True)
                ledger.add(key, trainer.run(lr, seed, steps))
                run = ledger.runs[key]
                print(f"{task} | {side}: lr {lr:g}, seed {seed}: {run.final():.5g} ({run.step_ms:.1f} ms)", flush=True)
            runs.append(ledger.runs[key])
    return runs


def best(runs: Sequence[Run]) -> list[Run]:
    """The runs, one a seed, of the learning rate with the lowest mean final loss."""
    rates = sorted({run.lr for run in runs})
    return min(([run for run in runs if run.lr == lr] for lr in rates), key=mean_final)


def mean_final(runs: Iterable[Run]) -> float:
    return statistics.fmean(run.final() for run in runs)


def crossings(runs: Sequence[Run], baseline: Sequence[Run]) -> list[float]:
    """Steps to the baseline's final loss of the same seed, as a share of the baseline's steps; infinite where never."""
    pairs = zip(runs, baseline, strict=True)
    return [(run.steps_to(base.final()) or math.inf) / base.evaluated[-1] for run, base in pairs]


def percent(shares: Sequence[float]) -> str:
    """Mean and every value; `never` where one run does not get there."""
    if math.inf in shares:
        return "never" if all(map(math.isinf, shares)) else "not by all"
    return f"{statistics.fmean(shares):.0%} ({', '.join(f'{share:.0%}' for share in shares)})"


def task_table(task: str, sides: dict[str, list[Run]]) -> str:
    """One row a side, each at its best learning rate."""
    rows = []
    baseline = best(sides[BASELINE])
    for side, runs in sides.items():
        chosen = best(runs)
        rates = sorted({run.lr for run in runs})
        inside = rates[0] < chosen[0].lr < rates[-1]
        rows.append(
            (
                f"`{side}`",
                f"{chosen[0].lr:g}" + ("" if inside else " **at the edge**"),
                f"{mean_final(chosen):.4g}",
                f"{mean_final(chosen) / mean_final(baseline):.3f}",
                f"{statistics.fmean(run.final('held_out') for run in chosen):.4g}",
                percent(crossings(chosen, baseline)),
                f"{statistics.median(run.step_ms for run in chosen):.2f}",
            )
        )
    steps, seeds = baseline[0].evaluated[-1], len(baseline)
    grid = f"{len(rates)} rates from {rates[0]:g} to {rates[-1]:g}, {seeds} seeds, {steps} steps"
    headers = ("side", "best rate", "final loss", "over AdamW's", "held out", "steps to AdamW's loss", "ms a step")
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) + ("right",) * 6)
    return f"### {task}: {TASKS[task].title}\n\n{grid}\n\n{table}\n"


def overview(results: dict[str, dict[str, list[Run]]]) -> str:
    """Final loss over AdamW's own, and share of its steps, of every side (rows) on every task (columns)."""
    sides = list(dict.fromkeys(side for task in results.values() for side in task if side != BASELINE))
    rows = []
    for side in sides:
        cells = []
        for task in results.values():
            chosen, baseline = best(task[side]), best(task[BASELINE])
            cells.append(f"{mean_final(chosen) / mean_final(baseline):.3f}")
            shares = crossings(chosen, baseline)
            cells.append("never" if math.inf in shares else f"{statistics.fmean(shares):.0%}")
        rows.append((f"`{side}`", *cells))
    headers = ["rule", *(header for task in results for header in (task, "steps"))]
    return "### Final loss over AdamW's\n\n" + tabulate(rows, headers, tablefmt="pipe", disable_numparse=True) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="may be repeated (default: digits)")
    parser.add_argument("--rule", action="append", help="Python, or Muon; may be repeated (default: Muon, MKOR())")
    parser.add_argument("--study", action="store_true", help=f"MKOR's options on {', '.join(STUDY_TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, help="training steps (default: each task's own)")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--out", type=Path, default=Path("sweep-output"), help="folder of runs.jsonl and report.md")
    options = parser.parse_args()

    tasks = options.task or (STUDY_TASKS if options.study else ("digits",))
    rules = options.rule or (STUDY if options.study else (MUON, "MKOR()"))
    ledger = Ledger(options.out / "runs.jsonl")
    results = {task: {side: sweep(ledger, task, side, options) for side in (BASELINE, *rules)} for task in tasks}
    sections = [task_table(task, sides) for task, sides in results.items()]
    if len(tasks) > 1:
        sections.append(overview(results))
    report = "\n".join(sections)
    (options.out / "report.md").write_text(report)
    print(f"\n{report}")


if __name__ == "__main__":
    main()
