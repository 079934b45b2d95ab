"""How long the longest step of a window is where all weights refresh at once, and where they take turns.

    python -m benchmarks.worst_step --every 10 --phases 1 5 10

On the autoencoder of `benchmarks.refresh_cost`, behind SGD: of each rule and number of phases the CPU milliseconds of a step
on average, of the longest in a window, and of the shortest; medians over windows.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

import mkor_fx
from benchmarks.refresh_cost import autoencoder, momentum_sgd
from benchmarks.step_sides import started

#: by the steps of a window
RULES: dict[str, Callable[[int], Any]] = {
    "KFAC()": lambda every: mkor_fx.KFAC(derive_every=every),
    "MKOR()": lambda every: mkor_fx.MKOR(),
}


def stepper(rule: Any, every: int, phases: int, backend: str) -> Callable[[], None]:
    case = autoencoder()
    model = started(case)
    step = mkor_fx.compile_step(
        model, case.loss_fn, momentum_sgd(model), rule, refresh_every=every, refresh_phases=phases, backend=backend
    )
    return lambda: step(*case.batch).item()


def window(step: Callable[[], None], every: int) -> list[float]:
    """CPU milliseconds of each step of one."""
    spent = []
    for _ in range(every):
        began = time.process_time()
        step()
        spent.append(1e3 * (time.process_time() - began))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=RULES, action="append", help="default: all")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--phases", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    options = parser.parse_args()

    sides = {
        (name, phases): stepper(RULES[name](options.every), options.every, phases, options.backend)
        for name in options.rule or RULES
        for phases in options.phases
    }
    for step in sides.values():
        window(step, 2 * options.every)  # compiles
    spent: dict[Any, list[list[float]]] = {side: [] for side in sides}
    for _ in range(options.windows):
        for side, step in sides.items():
            spent[side].append(window(step, options.every))
    rows = []
    for (name, phases), windows in spent.items():
        clocks: tuple[Callable[[list[float]], float], ...] = (statistics.fmean, max, min)
        shown = [f"{statistics.median([clock(steps) for steps in windows]):.1f}" for clock in clocks]
        rows.append((name, phases, *shown))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.backend}; {autoencoder().title}; "
          f"a refresh every {options.every} steps, {options.windows} windows\n")  # fmt: skip
    headers = ("rule", "phases", "a step, CPU ms", "longest", "shortest")
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) + ("right",) * 4))


if __name__ == "__main__":
    main()
