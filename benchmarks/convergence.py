"""`make convergence`: each side of a comparison at the best rate of one grid, over seeds, on every task.

    python -m benchmarks.convergence --task digits --side AdamW Muon "MKOR()" "MKOR(kappa=10.0) every 2"
    python -m benchmarks.convergence --study --seeds 0

All sides search the same grid with the first seed; where the best rate lies at its edge, the grid goes on by factors of two
until it lies inside. The other seeds run at the best rate and its two neighbours; where the median of all prefers one of
these, the search goes on beside it in the same way. The rate with the best median is reported. Every finished run is
appended to a ledger and never repeated: what was cut goes on where it stopped, and two processes may work on different
tasks. After the library or a task has changed, use another `--out`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.minilm import MINILM
from benchmarks.report import report
from benchmarks.sides import build, identity
from benchmarks.tasks import TASKS, Task
from benchmarks.training import Run, Trainer

ALL_TASKS = TASKS | {MINILM.name: MINILM}
PROOF = ("digits", "fashion", "fashion-ae", "cnn", "gpt", "minilm")
SIDES = (
    *("AdamW", "SGD", "Muon", "SOAP", "Shampoo", "KFAC()", "hooked K-FAC"),
    *(f"MKOR({options})" for options in ("", "rank=1", "rank=2", "rank=16", "statistic='gradient'")),
    "MKOR.published()",
)
STUDY_TASKS = ("digits", "fashion", "fashion-ae")
STUDY = (
    *("AdamW", "Muon", "MKOR()", "MKOR() every 2", "MKOR() every 5"),
    *(f"MKOR(kappa={kappa})" for kappa in (2.0, 10.0, 20.0)),
    *(f"MKOR(gamma={gamma})" for gamma in (0.9, 0.98, 0.99)),
    *(f"MKOR(momentum={momentum})" for momentum in (0.8, 0.95)),
    *("MKOR(nesterov=False)", "MKOR(beta2=0)", "MKOR(beta2=0.99)", "MKOR(bias='left')"),
    *("MKOR(rank=1)", "MKOR(rank=16)", "MKOR(statistic='gradient')", "MKOR(statistic='rows+gradient', rank=4)"),
    *("MKOR(factor_dtype=torch.bfloat16)", "MKOR(product_dtype=None)"),
)
WIDEST = 12  # rates that a grid may grow to


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


class Search:
    """The runs of one side on one task; what the ledger holds already is not run again."""

    def __init__(self, ledger: Ledger, task: Task, side: str, backend: str, steps: int | None) -> None:
        self.ledger, self.task, self.side, self.backend, self.steps = ledger, task, side, backend, steps or task.steps
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """Compiled when it is first asked for."""
        if self._trainer is None:
            self._trainer = build(self.task, self.side, self.backend)
            seconds = self._trainer.compile_seconds
            print(f"{self.task.name} | {self.side}: compiled in {seconds:.0f} s", flush=True)
        return self._trainer

    def run(self, lr: float, seed: int) -> Run:
        key = (self.task.name, identity(self.side), self.steps, lr, seed)
        if key not in self.ledger.runs:
            name = f"{self.task.name} | {self.side}"
            self.ledger.add(key, self.trainer.run(lr, seed, self.steps))
            found = self.ledger.runs[key]
            losses = f"{found.final():.5g} | {found.final('held_out'):.5g}"
            print(f"{name}: lr {lr:g}, seed {seed}: {losses} ({found.cpu_ms:.1f} ms)", flush=True)
        return self.ledger.runs[key]

    def kept(self) -> dict[float, list[Run]]:
        """What the ledger holds, by rate."""
        own, found = (self.task.name, identity(self.side), self.steps), dict[float, list[Run]]()
        for (*about, lr, _), run in sorted(self.ledger.runs.items(), key=lambda item: item[0][-1]):
            if tuple(about) == own:
                found.setdefault(lr, []).append(run)
        return found

    def all(self, seeds: Sequence[int], grid: Sequence[float]) -> dict[float, list[Run]]:
        """Runs by rate: the first seed's at all, every seed's at the best rate and beside it."""
        found: dict[float, list[Run]] = {}
        while (wanted := following(found, seeds, grid)) is not None:
            found.setdefault(wanted[0], []).append(self.run(*wanted))
        return dict(sorted(found.items()))


def following(runs: dict[float, list[Run]], seeds: Sequence[int], grid: Sequence[float]) -> tuple[float, int] | None:
    """Rate and seed that a search runs next behind ``runs``: the grid, what the first seed's best rate lacks, what the best
    rate of all seeds does. None: it is finished."""
    for lr in grid:
        if lr not in runs:
            return lr, seeds[0]
    wanted = lacking(runs, min(sorted(runs), key=lambda lr: runs[lr][0].final()), seeds)
    return wanted or lacking(runs, best_rate(runs), seeds)


def lacking(runs: dict[float, list[Run]], centre: float, seeds: Sequence[int]) -> tuple[float, int] | None:
    """The next rate and seed until a rate lies on each side of ``centre`` and every seed has run at all three."""
    rates = sorted(runs)
    at = rates.index(centre)
    near = rates[max(0, at - 1) : at + 2]
    if len(near) < 3 and len(runs) < WIDEST:
        return (centre / 2 if at == 0 else centre * 2), seeds[0]
    return next(((lr, seed) for lr in near for seed in seeds if seed not in {run.seed for run in runs[lr]}), None)


def finished(runs: dict[float, list[Run]], seeds: Sequence[int], grid: Sequence[float]) -> bool:
    """Whether nothing follows ``runs`` with as many of ``seeds`` as some rate has, two at least."""
    seen = max(map(len, runs.values()), default=0)
    return following(runs, seeds[: max(2, seen)], grid) is None


def best_rate(runs: dict[float, list[Run]]) -> float:
    """The rate with the lowest median final loss, of those that most seeds have run at."""
    seeds = max(map(len, runs.values()))
    return min((lr for lr, some in runs.items() if len(some) == seeds), key=lambda lr: median_final(runs[lr]))


def best(runs: dict[float, list[Run]]) -> list[Run]:
    """The runs, one a seed, at the best rate."""
    return runs[best_rate(runs)]


def median_final(runs: Sequence[Run]) -> float:
    return statistics.median(run.final() for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=ALL_TASKS, help=f"default: {', '.join(PROOF)}")
    parser.add_argument("--side", nargs="+", help=f"a name of sides.py, or a rule as Python; default: {', '.join(SIDES)}")
    parser.add_argument("--kept", action="store_true", help="run nothing, report the finished searches of the ledger")
    parser.add_argument("--study", action="store_true", help=f"MKOR's options on {', '.join(STUDY_TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", help="grid to begin with (default: each task's own)")
    parser.add_argument("--steps", type=int, help="training steps (default: each task's own)")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("convergence-output"), help="of runs.jsonl, report.md, plots")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tasks = options.task or (STUDY_TASKS if options.study else PROOF)
    sides = options.side or (STUDY if options.study else SIDES)
    ledger = Ledger(options.out / "runs.jsonl")
    results: dict[Task, dict[str, list[Run]]] = {}
    for name in tasks:
        task, found = ALL_TASKS[name], {}
        grid = options.rates or task.grid
        for side in sides:
            search = Search(ledger, task, side, options.backend, options.steps)
            runs = search.kept() if options.kept else search.all(options.seeds, grid)
            if finished(runs, options.seeds, grid):
                found[side] = best(runs)
            elif runs:
                print(f"left out, for its search is not finished: {name} | {side}, {sum(map(len, runs.values()))} runs")
        results |= {task: found} if found else {}
    text = report(results, options.out)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
