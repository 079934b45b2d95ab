"""Tables and plots of a comparison: one table and one plot a task, and an overview."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.tasks import Task
from benchmarks.training import Run, smoothed

#: by whose final loss the others are timed
TARGETS = ("AdamW", "Muon")
#: behind times of another processor
ELSEWHERE = " †"

Results = Mapping[Task, Mapping[str, Sequence[Run]]]


def report(results: Results, folder: Path) -> str:
    """Markdown of all tables; writes it to `report.md` and a plot of each task beside it."""
    sections = [table(task, sides) for task, sides in results.items()]
    if len(results) > 1:
        sections.append(overview(results))
    for task, sides in results.items():
        plot(task, sides, folder / f"{task.name}.png")
    text = "\n".join(sections)
    (folder / "report.md").write_text(text)
    return text


def table(task: Task, sides: Mapping[str, Sequence[Run]]) -> str:
    """One row a side at its best rate: medians over seeds, with their range, and what the targets' losses cost. Times of a
    processor that is not the first side's are marked."""
    targets = [name for name in TARGETS if name in sides]
    rows = []
    for side, runs in sides.items():
        mark = "" if timed_alike(sides, side) else ELSEWHERE
        row = [f"`{side}`", f"{runs[0].lr:g}", spread(run.final() for run in runs)]
        row += [spread(run.final("held_out") for run in runs)]
        row += [reaching(runs, sides[target], mark) for target in targets]
        rows.append([*row, f"{statistics.median(run.cost_ms for run in runs):.1f}{mark}"])
    steps = max(run.evaluated[-1] for runs in sides.values() for run in runs)
    seeds = " or ".join(map(str, sorted(set(map(len, sides.values())))))
    headers = ["side", "rate", "training", "held out", *(f"to {name}'s loss" for name in targets), "CPU ms a step"]
    alignment = ("left",) + ("right",) * (len(headers) - 1)
    text = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)
    about = f"{task.loss_name}, {steps} steps of batch {task.batch}, {seeds} seeds"
    return f"### {task.name}: {task.title}\n\n{about}\n\n{text}\n"


def timed_alike(sides: Mapping[str, Sequence[Run]], side: str) -> bool:
    """Whether a side ran on a processor like the first one's, as far as that is known."""
    first = next(iter(sides.values()))
    return sides[side][0].capability == first[0].capability


def spread(values: Iterable[float]) -> str:
    """Median, and the range of several values."""
    found = sorted(values)
    median = f"{statistics.median(found):.4g}"
    return median if len(found) == 1 else f"{median} ({found[0]:.4g} to {found[-1]:.4g})"


def reaching(runs: Sequence[Run], target: Sequence[Run], mark: str = "") -> str:
    """Steps, and seconds of the processor with a ``mark`` behind them, until the target's final loss of the same seed;
    medians over seeds."""
    goals = {goal.seed: goal.final() for goal in target}
    pairs = [(run, run.steps_to(goals[run.seed])) for run in runs if run.seed in goals]
    if any(steps is None for _, steps in pairs):
        return "never" if all(steps is None for _, steps in pairs) else "not by all"
    steps = statistics.median(steps for _, steps in pairs if steps)
    seconds = statistics.median(steps * run.cost_ms / 1e3 for run, steps in pairs if steps)
    return f"{steps:.0f}, {seconds:.1f} s{mark}"


def overview(results: Results) -> str:
    """Median final losses of every side (rows) on every task (columns), training | held out."""
    sides = dict.fromkeys(side for task in results.values() for side in task)
    rows = []
    for side in sides:
        found = [task.get(side) for task in results.values()]
        parts = ("training", "held_out")
        cells = [
            " | ".join(f"{statistics.median(run.final(part) for run in runs):.4g}" for part in parts) if runs else ""
            for runs in found
        ]
        rows.append([f"`{side}`", *(cell.replace("|", "/") for cell in cells)])
    headers = ["training / held out", *(task.name for task in results)]
    return "### All tasks\n\n" + tabulate(rows, headers, tablefmt="pipe", disable_numparse=True) + "\n"


def plot(task: Task, sides: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Median training loss against steps and against CPU time; dotted: held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True, layout="constrained")
    pairs = [plt.get_cmap("tab20")(index) for index in range(20)]  # a dark and a light one in turn: the dark ones first
    for colour, (side, runs) in zip((*pairs[::2], *pairs[1::2]) * len(sides), sides.items()):
        steps = min((run.evaluated for run in runs), key=len)
        seconds = [step * statistics.median(run.cost_ms for run in runs) / 1e3 for step in steps]
        for part, style in (("training", "-"), ("held_out", ":")):
            curves = zip(*(smoothed(getattr(run, part)) for run in runs))
            medians = [statistics.median(values) for values in curves][: len(steps)]
            label = {"label": side} if part == "training" else {}
            by_step.plot(steps, medians, style, color=colour, linewidth=1.5, **label)
            if timed_alike(sides, side):
                by_time.plot(seconds, medians, style, color=colour, linewidth=1.5)
    by_step.set(xlabel="steps", ylabel=task.loss_name, yscale="log", xlim=(0, None))
    by_step.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    by_step.yaxis.set_major_formatter("{x:g}")
    by_step.yaxis.set_minor_formatter(NullFormatter())
    by_time.set(xlabel="CPU seconds of training (compilation and evaluation left out)", xlim=(0, None))
    for axes in (by_step, by_time):
        axes.grid(which="both", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{task.title}; dotted: held out")
    figure.savefig(path, dpi=90)
    plt.close(figure)
