"""`make demo`: AdamW, torch's Muon and mkor_fx on real data, side by side.

Prints what is preconditioned and a table of the outcome; leaves `loss.png` and `graph.txt` in `demo-output/`.
"""

import argparse
import os
import shutil
import sysconfig
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

import mkor_fx
from benchmarks.tasks import TASKS, Task
from benchmarks.training import Run, Trainer, muon, smoothed

BASELINE, MUON, MKOR = "AdamW", "Muon + AdamW", "AdamW + mkor_fx"
COLOURS = {BASELINE: "#7a8290", MUON: "#2e86ab", MKOR: "#d1495b"}


def usable_backend() -> str:
    """`inductor` where its kernels can be built; else `eager`, which runs the same rewritten graph uncompiled."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(os.environ.get("CXX", "g++")) and headers.is_file():
        return "inductor"
    print(
        "Inductor needs a C++ compiler and Python's headers; without them the graph runs uncompiled, and slower.\n"
        "Debian and Ubuntu: apt-get install g++ python3-dev\n"
    )
    return "eager"


def train(name: str, trainer: Trainer, lr: float, steps: int) -> Run:
    """One run with a live progress bar."""
    with tqdm(total=steps, desc=f"{name:<{len(MKOR)}}", unit="step", dynamic_ncols=True) as bar:

        def report(step: int, loss: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)

        return trainer.run(lr, seed=0, steps=steps, report=report)


def outcome(runs: dict[str, Run], compile_seconds: dict[str, float], task: Task) -> str:
    """The final table, one row a side."""
    target = runs[BASELINE].final()
    rows = [
        (
            name,
            f"{run.lr:g}",
            f"{run.final():.4g}",
            f"{run.final('held_out'):.4g}",
            run.steps_to(target) or "not reached",
            f"{run.step_ms:.2f}",
            f"{compile_seconds[name]:.0f}",
        )
        for name, run in runs.items()
    ]
    headers = ("", "learning rate", task.loss_name, "held out", f"steps to {target:.4g}", "ms a step", "compile s")
    return tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 6)


def graph_report(trainer: Trainer) -> str:
    """Every stage of the compiled step, its operations counted, and the program that Inductor was given."""
    graphs = trainer.step.graphs
    counted = sorted(graphs.op_counts("lower").items(), key=lambda item: -item[1])
    counts = tabulate(counted, ("operation", "count"))
    program = graphs["lower"].print_readable(print_output=False)
    return f"{graphs}\n\nOperations of the final graph\n{counts}\n\nThe final graph\n{program}\n"


def plot(runs: dict[str, Run], task: Task, path: Path) -> None:
    """Loss against steps and against training time, with the step at which the baseline's final loss is reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for name, run in runs.items():
        seconds = [step * run.step_ms / 1e3 for step in run.evaluated]
        for axes, position in ((by_step, run.evaluated), (by_time, seconds)):
            axes.plot(position, smoothed(run.training), color=COLOURS[name], linewidth=2, label=name)
            axes.plot(position, smoothed(run.held_out), color=COLOURS[name], linewidth=1, linestyle=":", alpha=0.8)
    by_step.plot([], [], color="black", linewidth=1, linestyle=":", label="on held-out examples")
    target = runs[BASELINE].final()
    crossing = runs[MKOR].steps_to(target)
    if crossing:
        by_step.plot([crossing, runs[BASELINE].evaluated[-1]], [target] * 2, color="black", linewidth=1, dashes=(4, 3))
        by_step.plot(crossing, target, "o", color="black", markersize=5)
        last = runs[BASELINE].evaluated[-1]
        note = f"mkor_fx: AdamW's final loss after {crossing} of {last} steps"
        by_step.annotate(note, (last, target), (0, -3), textcoords="offset points", ha="right", va="top", fontsize=8)
    by_step.set(xlabel="steps", ylabel=task.loss_name, yscale="log", xlim=(0, None))
    by_time.set(xlabel="seconds of training (compilation and evaluation left out)", xlim=(0, None))
    for axes in (by_step, by_time):
        axes.grid(which="both", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_step.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    by_step.yaxis.set_minor_formatter(NullFormatter())
    by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_step.legend(frameon=False)
    figure.suptitle(task.title)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="digits", choices=TASKS)
    parser.add_argument("--steps", type=int, help="training steps (default: the task's own)")
    parser.add_argument("--backend", choices=("inductor", "eager"), help="default: inductor where it can compile")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of loss.png and graph.txt")
    options = parser.parse_args()

    task, backend = TASKS[options.task], options.backend or usable_backend()
    steps = options.steps or task.steps
    task.load()  # complains before anything is compiled
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{task.title}: {steps} steps of batch {task.batch}\n")

    runs, compile_seconds = {}, {}
    sides = {
        BASELINE: ("baseline", lambda: Trainer(task, backend=backend)),
        MUON: ("muon", lambda: Trainer(task, optimizers=muon, backend=backend)),
        MKOR: ("mkor", lambda: Trainer(task, mkor_fx.MKOR(), backend=backend)),
    }
    for name, (side, build) in sides.items():
        print(f"{name}: compiling the step ...", flush=True)
        trainer = build()
        compile_seconds[name] = trainer.compile_seconds
        if name == MKOR:
            print(f"\n{mkor_fx.explain(trainer.step)}\n")
            (options.out / "graph.txt").write_text(graph_report(trainer))
        runs[name] = train(name, trainer, task.rates[side], steps)

    plot(runs, task, options.out / "loss.png")
    print(f"\n{outcome(runs, compile_seconds, task)}\n\nThe curves: {options.out / 'loss.png'}")
    print(f"The program that ran: {options.out / 'graph.txt'}")


if __name__ == "__main__":
    main()
