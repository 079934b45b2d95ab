"""A torch optimizer's own step as a graph: traced from the live object, with its numbers as inputs.

Every number of ``param_groups`` (learning rate, betas, momentum, weight decay, ...) becomes an entry of one packed
tensor, so that schedulers compile nothing again. Comparisons such as ``weight_decay != 0`` are answered from the value at
trace time and remembered in ``Update.branches``; only a change of their answer asks for another trace.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ..runtime.optimizer import Number, numbers_of, read_number, tensor_state
from .backend import outside_dynamo
from .trace import shaped_like, trace

#: group options that choose between implementations of one update; the traced one is the plain loop
IMPLEMENTATION = {"foreach": False, "fused": False, "capturable": True, "differentiable": False}


@dataclass(frozen=True)
class Branch:
    """``number <operator> other`` was ``answer`` when the update was traced."""

    number: Number
    operator: str
    other: float
    answer: bool

    def holds(self, optimizer: Optimizer) -> bool:
        return bool(getattr(float(read_number(optimizer, self.number)), self.operator)(self.other)) == self.answer


@dataclass(frozen=True)
class Update:
    """The traced step: inputs ``params, grads, state tensors, packed numbers``; outputs ``new params, new state``."""

    module: fx.GraphModule
    state_keys: list[list[str]]
    branches: tuple[Branch, ...]


class _TensorNumbers(TorchFunctionMode):
    """Lets code written for Python floats run on 0-dim tensors: no ``.item()``, no data-dependent branch."""

    COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")

    def __init__(self, numbers: dict[int, tuple[Number, float]]) -> None:
        super().__init__()
        self.numbers = numbers
        self.branches: list[Branch] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and id(args[0]) in self.numbers:
            operator = f"__{name.strip('_')}__"
            if operator in self.COMPARISONS and isinstance(args[1], (int, float)):
                return self._decide(args[0], operator, float(args[1]))
            if operator == "__bool__":
                return self._decide(args[0], "__ne__", 0.0)
        for scale in ("alpha", "value"):
            if isinstance(kwargs.get(scale), Tensor):
                return _scaled(name, args, kwargs.pop(scale))
        return func(*args, **kwargs)

    def _decide(self, tensor: Tensor, operator: str, other: float) -> bool:
        number, value = self.numbers[id(tensor)]
        self.branches.append(Branch(number, operator, other, bool(getattr(value, operator)(other))))
        return self.branches[-1].answer


def _scaled(name: str, args: tuple, scale: Tensor) -> Tensor:
    """``x.add(y, alpha=s)``, ``x.addcmul(y, z, value=s)`` and kin for a tensor ``s``, which torch would read on the host."""
    kind = name.removesuffix("_")
    target, operands = args[0], args[1:]
    terms = {
        "add": lambda y: y * scale,
        "sub": lambda y: -(y * scale),
        "addcmul": lambda y, z: y * scale * z,
        "addcdiv": lambda y, z: y * scale / z,
    }
    if kind not in terms:
        raise NotImplementedError(f"torch.{name} scaled by a tensor")
    return target.add_(terms[kind](*operands)) if name.endswith("_") else target.add(terms[kind](*operands))


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """torch.compiler.is_compiling() is True: optimizers then keep their step count on the device."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def trace_update(optimizer: Optimizer, params: list[nn.Parameter]) -> Update:
    """Trace one step of ``optimizer`` over ``params`` (those with a gradient), whose state must exist.

    Raises:
        ValueError: the optimizer cannot be traced; says what stood in the way.
    """
    step = inspect.unwrap(type(optimizer).step)
    if len(params) != len({id(p) for p in params}):
        raise AssertionError("a parameter is listed twice")
    numbers = numbers_of(optimizer)
    states = [tensor_state(optimizer, p) for p in params]
    positions = {id(p): i for i, p in enumerate(params)}
    branches: list[Branch] = []

    def run(ps: list[Tensor], gs: list[Tensor], ss: list[dict[str, Tensor]], packed: Tensor) -> tuple[list, list]:
        ps, ss = [p.clone() for p in ps], [{k: v.clone() for k, v in s.items()} for s in ss]
        entries = {number: packed[i] for i, number in enumerate(numbers)}
        clone = object.__new__(type(optimizer))
        clone.__dict__.update(optimizer.__dict__)
        clone.param_groups = [
            _group_on_tensors(group, i, entries, [ps[positions[id(p)]] for p in group["params"] if id(p) in positions])
            for i, group in enumerate(optimizer.param_groups)
        ]
        clone.state = defaultdict(dict)
        for p, g, tensors, original in zip(ps, gs, ss, params):
            clone.state[p] = {**optimizer.state[original], **tensors}
            p.grad = g
        known = {id(t): (n, float(read_number(optimizer, n))) for n, t in entries.items()}
        with _compiling(), _TensorNumbers(known) as mode:
            step(clone)
        branches.extend(mode.branches)
        return ps, [clone.state[p][k] for p, s in zip(ps, ss) for k in s]

    args = (
        [shaped_like(p) for p in params],
        [shaped_like(p) for p in params],
        [{k: shaped_like(v) for k, v in s.items()} for s in states],
        torch.empty(len(numbers), dtype=torch.float64, device=params[0].device),
    )
    try:
        with outside_dynamo():
            traced = trace(torch.func.functionalize(run, remove="mutations_and_views"), args, fake=True)
    except Exception as error:
        raise ValueError(
            f"{type(optimizer).__name__}.step() cannot be traced into the compiled step: {str(error).splitlines()[0]}\n"
            "Use mkor_fx.compile(model) with your own loop: it works with every torch optimizer."
        ) from error
    return Update(traced.module, [list(s) for s in states], tuple(dict.fromkeys(branches)))


def _group_on_tensors(group: dict, index: int, entries: dict[Number, Tensor], params: list[Tensor]) -> dict:
    replaced = {**group, "params": params}
    replaced.update({k: v for k, v in IMPLEMENTATION.items() if k in group})
    for number, tensor in entries.items():
        if number.group != index:
            continue
        if number.position is None:
            replaced[number.key] = tensor
        else:
            values = list(replaced[number.key])
            values[number.position] = tensor
            replaced[number.key] = tuple(values)
    return replaced
