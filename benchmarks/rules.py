"""The table of docs/rules.md: what every rule keeps, costs and sends, and how it trains on two tasks.

    python -m benchmarks.rules --counted                        # without training
    python -m benchmarks.rules --out docs/convergence           # goes on where it stopped

Counted on one layer of 512 x 512 without bias under 2048 rows, in flops of its forward and backward; what `derive` does
outside of the program is not in them. Losses are those of `benchmarks.convergence`, each side at its own best rate, first
seed.
"""

import argparse
import math
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import mkor_fx
from benchmarks.convergence import ALL_TASKS, Ledger, Search, best
from benchmarks.sides import NAMED, rule_of
from mkor_fx.show.costs import count_costs

WIDTH, ROWS = 512, 2048
TASKS = ("digits", "fashion")
#: sides as benchmarks.sides reads them, and when to use each
SIDES = {
    "AdamW": "",
    "Muon": "",
    "MKOR()": "first: the default of both doors",
    "MKOR.published()": "factors behind any base optimizer, least traffic beside Eva",
    "KFAC()": "the curvature itself, for analysis or small layers",
    "EKFAC()": "as K-FAC, where its factors fit badly",
    "Eva()": "no room for factors",
    "SINGD()": "bfloat16 throughout, no inversion",
    "SINGD(structure='diagonal')": "as Eva, with a scale for every input and output",
    "KLDWRM(graft='gradient', kl_clip=None)": "to study regularisation by earlier networks; small rates",
    "CGFAC()": "K-FAC without inversions, factors that change fast",
    "CGFAC(curvature='sketches')": "wide layers: no factor is made",
    "HyLo()": "the exact curvature of a few rows, at once: small batches, no averages",
    "AdaFisher()": "a first-order method's state and cost",
    "ThermodynamicKFAC(derive_every=50)": "to study analogue inversion",
    "Shampoo()": "statistics of the gradient alone: nothing but gradients crosses the network",
    "SOAP()": "likewise, as a step of its own beside AdamW",
}


def counted(key: str) -> list[str]:
    if key in NAMED:
        return [""] * 4
    rule, _, _ = rule_of(key)
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    (entry,) = mkor_fx.explain(model, torch.randn(ROWS, WIDTH), rule=rule)
    assert entry.work is not None
    costs = count_costs(entry.work)
    state = sum(map(math.prod, entry.factors.values()))
    layer = 6 * ROWS * WIDTH * WIDTH
    return [
        f"{state / WIDTH**2:.2f}",
        f"{costs.refresh_flops / layer:.3f}",
        f"{costs.precondition_flops / layer:.3f}",
        f"{entry.sent:,}",
    ]


def trained(ledger: Ledger | None, task: str, key: str) -> str:
    """Training and held-out loss at the best rate."""
    assert ledger is not None
    search = Search(ledger, ALL_TASKS[task], key, "inductor", None)
    run = min(best(search.all([0], ALL_TASKS[task].grid)), key=lambda one: one.seed)
    return f"{run.final():.4g} / {run.final('held_out'):.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--counted", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("convergence-output"), help="of the ledger of runs")
    options = parser.parse_args()
    tasks = () if options.counted else TASKS
    sides = [key for key in options.side if tasks or key not in NAMED]
    ledger = Ledger(options.out / "runs.jsonl") if tasks else None
    rows = [[f"`{key}`", *counted(key), *(trained(ledger, t, key) for t in tasks), SIDES[key]] for key in sides]
    headers = ("rule", "state / weight", "refresh", "direction", "numbers sent", *tasks, "when to use")
    align = ("left", *["right"] * (4 + len(tasks)), "left")
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
