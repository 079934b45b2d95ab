"""How a step grows with the width of a model and with the rows of a batch, beside what its arithmetic says.

    python -m benchmarks.scaling

Three linear layers of one width behind SGD, with MKOR and without. Of every step CPU milliseconds, and what MKOR adds:
`O(width^3)` whatever the rows are, so that its share of the step falls as `1 / rows`. The slopes are those of a line
through the logarithms, of what was measured and of the counted multiply-adds.
"""

import argparse
import math
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch.nn import functional

from benchmarks import models
from benchmarks.cases import Case
from benchmarks.floor import layers
from benchmarks.step_sides import SIDES
from benchmarks.step_time import compile_seconds, cpu_seconds, measure

PLAIN, RULE = "SGD", "MKOR behind SGD"
WIDTHS, ROWS = (256, 512, 1024, 2048, 4096), (256, 1024, 4096, 16384)
#: of the one while the other varies
WIDTH, BATCH = 512, 256


def square(width: int, rows: int) -> Case:
    data = torch.Generator().manual_seed(0)
    batch = torch.randn(rows, width, generator=data), torch.randn(rows, width, generator=data)
    return Case(f"{width} wide, {rows} rows", lambda: models.mlp(*[width] * 4), functional.mse_loss, batch)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def table(points: Sequence[tuple[int, int]], rounds: int, backend: str) -> str:
    """A row for each ``(width, rows)``, of which one varies."""
    found = []
    for width, rows in points:
        case = square(width, rows)
        steps = {name: SIDES[name](case, backend) for name in (PLAIN, RULE)}
        for step in steps.values():
            compile_seconds(step)
        records = measure(steps, rounds, max(1, min(10, int(2e10 / (width**2 * (rows + width))))))
        plain, whole = (1e3 * cpu_seconds(records, name) for name in steps)
        counted = layers(case)
        forward, added = sum(layer.own for layer in counted), sum(layer.preconditioning for layer in counted)
        found.append((width, rows, plain, whole - plain, whole / plain, forward / 1e6, added / 1e6))
    varied = [float(point[0] if points[0][0] != points[-1][0] else point[1]) for point in points]
    slopes = ["slope", ""] + [f"{slope(varied, [row[at] for row in found]):.2f}" for at in (2, 3, 4, 5, 6)]
    shown = [[str(w), str(n), *(f"{x:,.1f}" for x in (plain, more)), f"{ratio:.2f}", *(f"{x:,.0f}" for x in counted)]
             for w, n, plain, more, ratio, *counted in found]  # fmt: skip
    headers = ("width", "rows", "plain, ms", "MKOR adds, ms", "ratio", "plain, M multiply-adds", "MKOR adds, M")
    return tabulate([*shown, slopes], headers, tablefmt="pipe", disable_numparse=True, colalign=("right",) * 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print(table([(width, BATCH) for width in options.widths], options.rounds, options.backend), flush=True)
    print(f"\n{table([(WIDTH, rows) for rows in options.rows], options.rounds, options.backend)}")


if __name__ == "__main__":
    main()
