"""The measured tables of docs/optimizers.md: what optimizers cost in one compiled step, and how they train on two tasks.

    python -m benchmarks.optimizers --model mlp                  # and gpt
    python -m benchmarks.optimizers --train --out docs/convergence    # goes on where it stopped

Every optimizer takes its steps alone (`compile_step(rule=None)`), all side by side in one process, from the same weights.
What the update of one cannot cost less than is counted: flops of its products by torch, an operation an element for
everything else of its own loop, and each byte of weights, gradients and state once each way where it changes; all at the
rates that torch reaches here. `over` is the measured step over AdamW's, with AdamW's counted update in it exchanged for the
optimizer's own.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.convergence import ALL_TASKS, Ledger, Search, best
from benchmarks.floor import multiplied, seconds_a_byte, seconds_an_element
from benchmarks.sides import FOLLOWED
from benchmarks.step_sides import adamw, compiled, started, torch_compiled
from benchmarks.step_time import Record, compile_seconds, measure
from mkor_fx.optim import COAP

Build = Callable[[nn.Module], Sequence[Optimizer]]
TASKS = ("digits", "fashion")
COUNTED = 10  #: steps that are counted, behind the first
TRAINED = ("AdamW", "SGD", "Muon", "MKOR()", "SOAP", "Shampoo", *FOLLOWED)
#: operations that take several times as long as a sum or a product
SLOW = ("div", "addcdiv", "sqrt", "rsqrt", "pow", "exp", "log", "reciprocal")
#: operations that a program has no need of, or that make no numbers
FREE = ("detach", "empty", "zeros_like", "clone", "copy", "to_copy")
#: flops of decompositions of ``[m, n]``, over ``m n^2``: an orthonormal basis, and singular vectors of both sides
DECOMPOSED = {"linalg_qr": 4, "linalg_svd": 14}
#: whose product gives the rate of all
SIZE = 768


def of(build: Callable[..., list[Optimizer]], **options: Any) -> Build:
    return lambda model: build(None, model, **options)


SIDES: dict[str, Build] = {
    "AdamW": adamw,
    **{name: of(build) for name, build in FOLLOWED.items()},
    "COAP, P moved in every step": lambda model: [COAP(model.parameters(), every=1, sketch_every=10**6)],
    "COAP, P made anew in every step": lambda model: [COAP(model.parameters(), every=1, sketch_every=1)],
}


class Work(NamedTuple):
    """Of one update, on average: flops of products, elements of other operations by their kind, bytes."""

    products: float
    plain: float
    slow: float
    moved: float

    @property
    def seconds(self) -> float:
        computed = self.plain * seconds_an_element("mul") + self.slow * seconds_an_element("sqrt")
        multiplying = self.products * multiplied(SIZE, SIZE, SIZE, torch.float32) / (2 * SIZE**3)
        return multiplying + computed + self.moved * seconds_a_byte(int(self.moved))


class Elements(TorchDispatchMode):
    """Elements that operations other than products and views make, or reduce; flops of decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.slow = self.decomposed = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        size = max((t.numel() for t in tree_leaves((args, out)) if isinstance(t, Tensor)), default=0)
        if name in DECOMPOSED:
            short, long = sorted(args[0].shape)
            self.decomposed += DECOMPOSED[name] * long * short**2
        elif name in SLOW:
            self.slow += size
        elif not func.is_view and name not in (*FREE, "mm"):
            self.plain += size
        return out


def work(case: Case, build: Build) -> Work:
    """Counted in the optimizer's own loop."""
    model = started(case)
    optimizers = build(model)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group |= {key: False for key in ("foreach", "fused") if key in group}
    elements, flops = Elements(), FlopCounterMode(display=False)
    stepped(model, optimizers)
    before = {key: tensor.clone() for key, tensor in _state(optimizers).items()}
    with elements, flops:
        for _ in range(COUNTED):
            stepped(model, optimizers)
    moved = sum(3 * p.nbytes for p in model.parameters())
    for key, tensor in _state(optimizers).items():
        moved += tensor.nbytes * (1 if torch.equal(tensor, before[key]) else 2)
    found = flops.get_total_flops() + elements.decomposed, elements.plain, elements.slow
    products, plain, slow = (number / COUNTED for number in found)
    return Work(products, plain, slow, moved)


def stepped(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """At random gradients, the same in every step."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.grad is None else p.grad
    for optimizer in optimizers:
        optimizer.step()


def _state(optimizers: Sequence[Optimizer]) -> dict[tuple, Tensor]:
    states = ((i, j, own) for i, o in enumerate(optimizers) for j, own in enumerate(o.state.values()))
    return {(i, j, key): t for i, j, own in states for key, t in own.items() if isinstance(t, Tensor)}


def state_size(case: Case, build: Build) -> float:
    """Bytes of state over bytes of weights."""
    model = started(case)
    optimizers = build(model)
    stepped(model, optimizers)
    return sum(t.nbytes for t in _state(optimizers).values()) / sum(p.nbytes for p in model.parameters())


def costs(case: Case, sides: Sequence[str], rounds: int, length: int, backend: str) -> str:
    steps = {name: compiled(SIDES[name])(case, backend) for name in sides}
    steps["AdamW, torch.compile"] = torch_compiled(adamw)(case, backend)
    for step in steps.values():
        compile_seconds(step)
    records = measure(steps, rounds, length)
    first = work(case, SIDES["AdamW"]).seconds
    rows = []
    for name in steps:
        build = SIDES.get(name, adamw)
        own = work(case, build)
        spent = [statistics.median(record[name][clock] for record in records) for clock in (0, 1)]
        rows.append([
            name, f"{state_size(case, build):.3g}", f"{own.products / 1e6:,.0f}", f"{(own.plain + own.slow) / 1e6:,.0f}",
            f"{own.moved / 1e6:,.0f}", f"{1e3 * own.seconds:.1f}", *(f"{1e3 * seconds:.1f}" for seconds in spent),
            f"{over(records, name, own.seconds - first):.2f}",
        ])  # fmt: skip
    headers = ("optimizer", "state", "products, M", "elements, M", "MB", "counted ms", "CPU ms", "wall ms", "over")
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 8))
    return f"### {case.title}\n\n{table}"


def over(records: Sequence[Record], name: str, added: float) -> float:
    """Median over rounds of a step over AdamW's with ``added`` seconds."""
    return statistics.median(record[name][0] / (record["AdamW"][0] + added) for record in records)


def trained(sides: Sequence[str], out: Path) -> str:
    """Training / held-out loss and rate of each side at its best rate, first seed, and CPU time a step."""
    ledger, rows = Ledger(out / "runs.jsonl"), {side: [f"`{side}`"] for side in sides}
    for name in TASKS:
        for side in sides:
            search = Search(ledger, ALL_TASKS[name], side, "inductor", None)
            run = min(best(search.all([0], ALL_TASKS[name].grid)), key=lambda one: one.seed)
            rows[side] += [f"{run.lr:g}", f"{run.final():.4g} / {run.final('held_out'):.4g}"]
    headers = ("optimizer", *(head for name in TASKS for head in ("rate", name)))
    return tabulate(rows.values(), headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "gpt"), default="mlp")
    parser.add_argument("--side", nargs="+", help=f"default: {', '.join(SIDES)}; with --train: {', '.join(TRAINED)}")
    parser.add_argument("--train", action="store_true", help="train instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=10, help="steps a side and round")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--out", type=Path, default=Path("convergence-output"), help="of the ledger of runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        print(trained(options.side or TRAINED, options.out))
        return
    case = cases.mlp(batch=64) if options.model == "mlp" else cases.gpt(128, 2, 4)
    sides = ["AdamW", *(side for side in options.side or SIDES if side != "AdamW")]
    print(costs(case, sides, options.rounds, options.length, options.backend))


if __name__ == "__main__":
    main()
