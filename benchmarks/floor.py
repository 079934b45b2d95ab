"""What MKOR has to add to a step at least: its products at the rate at which torch multiplies matrices of that shape and
dtype, its bytes at that of a copy, both measured here and now: CPU seconds, on a GPU the seconds that it is busy."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn

import mkor_fx
from benchmarks.cases import Case, hidden
from mkor_fx.rules.direction import product_dtype_of

CPU = torch.device("cpu")


class Layer(NamedTuple):
    """A weight as a matrix ``[outputs, inputs]`` and the rows that it sees in one step."""

    name: str
    outputs: int
    inputs: int
    rows: int
    for_muon: bool

    @property
    def own(self) -> int:
        """Multiply-adds of forward and backward."""
        return 3 * self.rows * self.outputs * self.inputs

    @property
    def preconditioning(self) -> int:
        """Multiply-adds of ``L M R``."""
        return self.outputs * self.inputs * (self.outputs + self.inputs)


def layers(case: Case) -> list[Layer]:
    model, found = case.model(), dict[str, Layer]()
    matrices = {id(w) for w in hidden(model)}

    def watch(module: Any, inputs: Any, output: torch.Tensor, *, name: str) -> None:
        o = module.weight.shape[0]
        found[name] = Layer(name, o, module.weight[0].numel(), output.numel() // o, id(module.weight) in matrices)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(functools.partial(watch, name=name))
    with torch.no_grad():
        model(case.batch[0])
    return [*found.values()]


def muon_multiply_adds(layer: Layer) -> int:
    """``X X^T``, its square, and a product with ``X``, five times."""
    small, large = sorted((layer.outputs, layer.inputs))
    return layer.for_muon * 5 * (2 * small * small * large + small**3)


def counts(case: Case) -> str:
    """Multiply-adds a step of every layer, what MKOR and Muon add to them, and the size of MKOR's float32 factors."""
    table = [("attention", "", case.attention, 0, 0, 0)] if case.attention else []
    for layer in layers(case):
        o, i = layer.outputs, layer.inputs
        factors = 4 * (o * o + i * i)
        table.append(
            (layer.name, f"{o} x {i}", layer.own, layer.preconditioning, muon_multiply_adds(layer), factors)
        )
    forward, mkor, muon, factors = (sum(column) for column in zip(*(row[2:] for row in table)))
    table.append(("total", "", forward, mkor, muon, factors))
    rows = [(*row[:2], *(f"{n / 1e6:,.0f}" for n in row[2:5]), f"{row[5] / 2**20:.2f}") for row in table]
    headers = ("layer", "O x I", "forward + backward, M", "MKOR, M", "Muon, M", "factors, MiB")
    counted = tabulate(rows, headers, disable_numparse=True, colalign=("left", "left") + ("right",) * 4)
    return f"{counted}\n\nIn multiply-adds a step is at least: MKOR {1 + mkor / forward:.3f}, Muon {1 + muon / forward:.3f}."


class Floor(NamedTuple):
    """Seconds that a step of MKOR adds at least."""

    products: float  #: of the two sides with the momentum
    updates: float  #: of the factors, half a product each, since they are symmetric
    traffic: float  #: momentum and factors through memory

    @property
    def total(self) -> float:
        return sum(self)

    def __str__(self) -> str:
        parts = (f"{1e3 * seconds:.1f} {name}" for name, seconds in self._asdict().items())
        return f"{1e3 * self.total:.1f} ms ({', '.join(parts)})"


def floor(case: Case, rule: Any = None) -> Floor:
    """Of ``rule``, an MKOR, refreshed at every step, behind an optimizer that is free. The momentum is read and written
    once, a factor read twice, the first time by its product with sketches, and written once; statistics are free, as if made
    where the rows are read anyway."""
    rule = mkor_fx.MKOR() if rule is None else rule
    wide, device = torch.float32, case.batch[0].device
    product = product_dtype_of(rule.product_dtype, wide, device)
    products = updates = 0.0
    moved = 0
    for layer in layers(case):
        o, i = layer.outputs, layer.inputs
        products += multiplied(o, o, i, product, device) + multiplied(o, i, i, product, device)
        for size in (o, i):
            columns = rule.rank + rule.probes(size)
            updates += multiplied(size, columns, size, wide, device) / 2
            moved += 3 * size * size * rule.factor_dtype.itemsize
        moved += 2 * o * i * wide.itemsize
    return Floor(products, updates, moved * seconds_a_byte(moved, device))


@functools.cache
def multiplied(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device = CPU) -> float:
    """Seconds of ``[m, k] @ [k, n]`` by torch."""
    left, right = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    return _median(lambda: torch.mm(left, right, out=out), 2e8 / (m * k * n), device)


@functools.cache
def seconds_a_byte(size: int, device: torch.device = CPU) -> float:
    """Of a copy between two arrays that together have so many bytes, of which it moves each once."""
    half = max(1 << 16, min(size, 1 << 28) // 2)
    source, target = (torch.ones(half, dtype=torch.uint8, device=device) for _ in range(2))
    return _median(lambda: target.copy_(source), 1e7 / half, device) / (2 * half)


@functools.cache
def seconds_an_element(operation: str) -> float:
    """Of an operation of torch on one array that lies in the cache."""
    source = torch.rand(1 << 13) + 0.5
    function, out = getattr(torch, operation), torch.empty_like(source)
    arguments = (source, source) if operation == "mul" else (source,)
    return _median(lambda: function(*arguments, out=out), 3e7 / source.numel(), CPU) / source.numel()


#: calls of a round: of small operands a call costs a microsecond, whatever they are
MOST = 10_000


def _median(call: Callable[[], Any], repeats: float, device: torch.device, rounds: int = 7) -> float:
    """Seconds of a call, median over rounds of so many."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median") / 1e3
    repeats, found = min(max(1, int(repeats)), MOST), list[float]()
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(repeats):
            call()
        found.append((time.process_time() - began) / repeats)
    return statistics.median(found[1:])
