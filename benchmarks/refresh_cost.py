"""What refreshing seldom saves: a step on an autoencoder at f = 1, 10 and 100, of the published MKOR, K-FAC and MKOR.

    python -m benchmarks.refresh_cost

Beside the paper's milliseconds on an autoencoder of its own, on a GPU (Mozaffari et al., NeurIPS 2023): MKOR 12.1, 8.0, 7.7,
KAISA 259.6, 33.7, 12.2. What compares is each row over its own f = 100. K-FAC takes statistics and inverts every f-th step.
"""

import argparse
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional

import mkor_fx
from benchmarks import models
from benchmarks.cases import Case
from benchmarks.step_sides import compiled
from benchmarks.step_time import compile_seconds, cpu_seconds, measure

EVERY = (1, 10, 100)
#: what refreshes, and the paper's milliseconds
SIDES: dict[str, tuple[Any, tuple[float, ...]]] = {
    "MKOR.published()": (lambda every: mkor_fx.MKOR.published(), (12.1, 8.0, 7.7)),
    "KFAC()": (lambda every: mkor_fx.KFAC(derive_every=every), (259.6, 33.7, 12.2)),
    "MKOR()": (lambda every: mkor_fx.MKOR(), ()),
}


def autoencoder(batch: int = 256) -> Case:
    """The deep autoencoder of Hinton and Salakhutdinov (2006)."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    images = torch.rand(batch, 784, generator=torch.Generator().manual_seed(0))
    title = f"autoencoder {'-'.join(map(str, sizes))}, {batch} rows"
    return Case(title, lambda: models.mlp(*sizes), functional.mse_loss, (images, images))


def momentum_sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=100, help="steps a side and round; a multiple of 100 is fair")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    options = parser.parse_args()

    case = autoencoder()
    steps = {"SGD": compiled(momentum_sgd)(case, options.backend)}
    for name, (rule, _) in SIDES.items():
        steps |= {f"{name} {f}": compiled(momentum_sgd, rule(f), f)(case, options.backend) for f in EVERY}
    for step in steps.values():
        compile_seconds(step)
    records = measure(steps, options.rounds, options.length)
    spent = {name: 1e3 * cpu_seconds(records, name) for name in steps}
    rows = [["SGD", f"{spent['SGD']:.1f}", *[""] * (2 * len(EVERY))]]
    for name, (_, paper) in SIDES.items():
        own = [spent[f"{name} {every}"] for every in EVERY]
        shown = [f"{ms:.1f} ({ms / own[-1]:.2f})" for ms in own]
        rows.append([name, "", *shown, *(f"{ms} ({ms / paper[-1]:.2f})" for ms in paper)])
    headers = ("CPU ms a step", "no rule", *(f"f = {f}" for f in EVERY), *(f"paper: f = {f}" for f in EVERY))
    print(f"{case.title}, {torch.get_num_threads()} threads; in brackets over f = {EVERY[-1]}\n")
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left",) + ("right",) * 7))


if __name__ == "__main__":
    main()
