"""`make paper`: the table of the MKOR paper, steps and time to LAMB's final loss on a BERT, at a size for two cores.

    python -m benchmarks.paper --out paper-output            # goes on where it stopped
    python -m benchmarks.paper --steps 60 --rates 2e-3       # a quick look

Every side is compiled by this library and has its best rate of one grid. Steps, and CPU seconds, are those
until the smoothed training loss is as low as LAMB's in the end; `sent` is what a side's statistics would send between ranks
until then, in numbers. The paper's figures are its own, on 64 GPUs (Mozaffari et al., NeurIPS 2023, Table 2).
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

import mkor_fx
from benchmarks.bert import FINE_TUNING, PRETRAINING, Rated, load_rated
from benchmarks.convergence import Ledger, Search, best
from benchmarks.sides import NAMED, build, identity, rule_of
from benchmarks.training import Run


class Side(NamedTuple):
    """``key`` as benchmarks.sides reads it; the paper's steps, and time over LAMB's, where it has them."""

    key: str
    steps: int | None = None
    speed: float | None = None


PAPER_LAMB = 1563  # its steps
SIDES = {
    "LAMB": Side("LAMB", PAPER_LAMB, 1.0),
    "AdamW": Side("AdamW"),
    "Muon + AdamW": Side("Muon"),
    "KAISA + LAMB": Side("KFAC(pi=False) every 10 behind LAMB", 1000, 1.39),
    "Eva + LAMB": Side("Eva() behind LAMB"),
    "MKOR published + LAMB": Side("MKOR.published() every 10 behind LAMB", 1000, 1.52),
    "MKOR-H published + LAMB": Side("Hybrid(MKOR.published(), window=20) every 10 behind LAMB", 600, 2.57),
    "MKOR": Side("MKOR()"),
    "MKOR-H": Side("Hybrid(MKOR(), window=20)"),
}


class Tuned(NamedTuple):
    """Loss and share of right signs on held-out sentences, behind fine-tuning."""

    loss: float
    accuracy: float


def sent(key: str, steps: int | None) -> str:
    """Numbers of statistics that a side sends in so many steps; of MKOR-H if all were by the rule."""
    if steps is None or key in NAMED:
        return "" if steps is None else "0"
    rule, every, _ = rule_of(key)
    x, _ = next(PRETRAINING.batches(seed=0))
    coverage = mkor_fx.explain(PRETRAINING.build(seed=0), x, rule=rule)
    return f"{sum(entry.sent for entry in coverage) * -(-steps // every):,}"


class Pretraining(Search):
    """Keeps what its runs have trained, by rate and seed."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.weights: dict[tuple[float, int], dict[str, torch.Tensor]] = {}

    def run(self, lr: float, seed: int) -> Run:
        finished = len(self.ledger.runs)
        run = super().run(lr, seed)
        if len(self.ledger.runs) > finished:
            self.weights[lr, seed] = copy.deepcopy(self.trainer.model.state_dict())
        return run

    def trained(self, lr: float, seed: int) -> Any:
        """The model behind a run; trained anew where that was another process's."""
        if (lr, seed) in self.weights:
            self.trainer.model.load_state_dict(self.weights[lr, seed])
        else:
            self.trainer.run(lr, seed, self.steps)
        return self.trainer.model


def fine_tuned(search: Pretraining, lr: float, seed: int) -> Tuned:
    """The encoder behind a side's best rate, fine-tuned by the same side at a quarter of it.

    Not by Inductor, whose minutes so few steps do not repay; but for Muon, whose products in bfloat16 torch alone emulates
    on processors without it, at ten times the step.
    """
    trained = search.trained(lr, seed)
    task = replace(FINE_TUNING, architecture=lambda: Rated(copy.deepcopy(trained.bert.bert)))
    tuner = build(task, search.side, search.backend if search.side == "Muon" else "eager")
    tuner.run(lr / 4, seed, min(search.steps, task.steps))
    _, held_out = load_rated()
    x, y = held_out.draw(len(held_out.targets), torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = torch.cat([tuner.model(part) for part in x.split(256)])
    return Tuned(task.loss_fn(logits, y).item(), (logits.argmax(1) == y).float().mean().item())


def row(name: str, side: Side, run: Run, base: Run, tuned: Tuned) -> list[str]:
    target, whole = base.final(), base.steps_to(base.final())
    steps = run.steps_to(target)
    assert whole is not None
    reached = steps is not None
    paper_steps = "" if side.steps is None else f"{side.steps} ({side.steps / PAPER_LAMB:.2f})"
    return [
        name,
        f"{run.lr:g}",
        f"{run.final():.4g} / {run.final('held_out'):.4g}",
        f"{steps} ({steps / whole:.2f})" if reached else "never",  # type: ignore[operator]
        f"{steps * run.mean_cpu_ms / 1e3:.0f} s" if reached else "",  # type: ignore[operator]
        f"{whole * base.mean_cpu_ms / (steps * run.mean_cpu_ms):.2f}" if reached else "",  # type: ignore[operator]
        sent(side.key, steps),
        paper_steps,
        "" if side.speed is None else f"{side.speed:.2f}",
        f"{tuned.loss:.3f}, {tuned.accuracy:.1%}",
    ]


class Tunings:
    """What fine-tuning has come to, by what was fine-tuned, in a JSONL file with a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {entry["about"]: Tuned(*entry["tuned"]) for entry in map(json.loads, lines)}

    def of(self, search: Pretraining, lr: float, seed: int) -> Tuned:
        """Looked up, or done now."""
        about = f"{identity(search.side)}, {search.steps} steps, rate {lr:g}, seed {seed}"
        if about not in self.found:
            self.found[about] = fine_tuned(search, lr, seed)
            with self.path.open("a") as file:
                file.write(json.dumps({"about": about, "tuned": self.found[about]}) + "\n")
        return self.found[about]


def side_by_side(names: Sequence[str], options: argparse.Namespace) -> None:
    """Every side in a process of its own with one thread, `jobs` at a time: two processes share two cores better than two
    threads do, since compiling and evaluating have little that divides."""
    call = [sys.executable, "-m", "benchmarks.paper", "--jobs", "0", "--seed", str(options.seed)]
    call += ["--backend", options.backend, "--out", str(options.out)]
    call += ["--steps", str(options.steps)] if options.steps else []
    call += ["--rates", *map(str, options.rates)] if options.rates else []
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(lambda name: subprocess.run([*call, "--side", name], check=True), names):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rates", type=float, nargs="+", help="grid to begin with")
    parser.add_argument("--steps", type=int, help="training steps (default: the task's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--jobs", type=int, default=2, help="sides at a time; 0: here, without the table")
    parser.add_argument("--out", type=Path, default=Path("paper-output"), help="of runs.jsonl, fine-tuned.jsonl, table.md")
    options = parser.parse_args()

    torch.set_num_threads(1)
    names = options.side if options.jobs == 0 else list(dict.fromkeys(["LAMB", *options.side]))
    if options.jobs:
        side_by_side(names, options)
    ledger, tunings, rows = Ledger(options.out / "runs.jsonl"), Tunings(options.out / "fine-tuned.jsonl"), []
    base: Run | None = None
    for name in names:
        search = Pretraining(ledger, PRETRAINING, SIDES[name].key, options.backend, options.steps)
        (run,) = best(search.all([options.seed], options.rates or PRETRAINING.grid))
        base, tuned = base or run, tunings.of(search, run.lr, options.seed)
        if options.jobs:
            rows.append(row(name, SIDES[name], run, base, tuned))
    if not options.jobs:
        return
    headers = (
        *("side", "rate", "training / held out", "steps to LAMB's loss", "CPU time", "speed-up", "sent"),
        *("paper: steps", "paper: speed-up", "fine-tuned, held out: loss, right"),
    )
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) + ("right",) * 9)
    (options.out / "table.md").write_text(f"{table}\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
