"""The step of torch optimizers as a graph: traced from the live objects, with their numbers as inputs.

Every number of ``param_groups`` (learning rate, betas, momentum, weight decay, ...) becomes an entry of one packed
tensor, so that schedulers compile nothing again. Comparisons such as ``weight_decay != 0`` are answered from the value at
trace time and remembered in ``Update.branches``; only a change of their answer asks for another trace.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ...runtime.optimizer_state import Number, initialise_state, numbers_of, read_number, tensor_state
from ...runtime.optimizers import Optimizers
from ..torch_api.backend import new_fake_mode
from ..torch_api.dynamo import compiling, outside_dynamo
from ..torch_api.tracing import forget_values, shaped_like, trace

#: group options that choose between implementations of one update; the traced one is the plain loop
IMPLEMENTATION = {"foreach": False, "fused": False, "capturable": True, "differentiable": False}


@dataclass(frozen=True)
class Branch:
    """``number <operator> other`` was ``answer`` when the update was traced."""

    number: Number
    operator: str
    other: float
    answer: bool

    def holds(self, optimizer: Optimizers) -> bool:
        return bool(getattr(float(read_number(optimizer, self.number)), self.operator)(self.other)) == self.answer


@dataclass(frozen=True)
class Update:
    """The traced step: inputs ``params, grads, state tensors, packed numbers``; outputs ``new params, new state``.

    ``states`` are examples of each parameter's state tensors, by name.
    """

    module: fx.GraphModule
    states: list[dict[str, Tensor]]
    branches: tuple[Branch, ...]


class _TensorNumbers(TorchFunctionMode):
    """Lets code written for Python floats run on 0-dim tensors: no ``.item()``, no data-dependent branch."""

    COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
    WRITES = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__setitem__")

    def __init__(self, numbers: dict[int, tuple[Number, float]]) -> None:
        super().__init__()
        self.numbers = numbers
        self.branches: list[Branch] = []
        self.written: list[Number] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and id(args[0]) in self.numbers:
            operator = f"__{name.strip('_')}__"
            if operator in self.COMPARISONS and isinstance(args[1], (int, float)):
                return self._decide(args[0], operator, float(args[1]))
            if operator == "__bool__":
                return self._decide(args[0], "__ne__", 0.0)
        if (name.endswith("_") and not name.endswith("__")) or name in self.WRITES:
            targets = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
            self.written += [self.numbers[id(t)][0] for t in targets if id(t) in self.numbers]
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


def planned(optimizers: Optimizers, params: Sequence[nn.Parameter]) -> tuple[Optimizers, list[Tensor]]:
    """Copies of the optimizers over stand-ins for ``params``, with the state that their first step would begin from: fake
    tensors, so that nothing is allocated, and nothing of the user's is changed."""
    with torch.no_grad(), outside_dynamo(), new_fake_mode():
        stands_for = {id(p): shaped_like(p) for p in params}
        clones = Optimizers([_stand_in(member, params, stands_for) for member in optimizers.members])
        initialise_state(clones, list(stands_for.values()))  # type: ignore[arg-type]
    return clones, list(stands_for.values())


def _stand_in(optimizer: Optimizer, params: Sequence[nn.Parameter], stands_for: dict[int, Tensor]) -> Optimizer:
    clone = _bare(optimizer)
    clone.param_groups = [
        {key: _without_memory(value) for key, value in group.items() if key != "params"}
        | {"params": [stands_for[id(p)] for p in group["params"] if id(p) in stands_for]}
        for group in optimizer.param_groups
    ]
    for p in params:
        if p in optimizer.state:
            held = optimizer.state[p]
            clone.state[stands_for[id(p)]] = {key: _without_memory(value) for key, value in held.items()}
    return clone


def _bare(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class and attributes, whose state is empty."""
    clone = object.__new__(type(optimizer))
    clone.__dict__.update(vars(optimizer))
    clone.state = defaultdict(dict)
    return clone


def _without_memory(value: Any) -> Any:
    return shaped_like(value) if isinstance(value, Tensor) else value


def trace_update(optimizers: Optimizers, params: Sequence[nn.Parameter]) -> Update:
    """Trace one step of every optimizer over ``params``, those with a gradient. Allocates nothing, changes nothing.

    Raises:
        ValueError: an optimizer cannot be traced; says what stood in the way.
    """
    if len(params) != len({id(p) for p in params}):
        raise AssertionError("a parameter is listed twice")
    numbers = numbers_of(optimizers)
    start, stand_ins = planned(optimizers, params)
    states = [tensor_state(start, p) for p in stand_ins]  # type: ignore[arg-type]
    positions = {id(p): i for i, p in enumerate(params)}
    branches: list[Branch] = []
    made: dict[str, set[str]] = defaultdict(set)
    hidden: dict[str, list[str]] = defaultdict(list)
    name = ""

    def run(ps: list[Tensor], gs: list[Tensor], ss: list[dict[str, Tensor]], packed: Tensor) -> tuple[list, list]:
        nonlocal name
        ps, ss = [p.clone() for p in ps], [{k: v.clone() for k, v in s.items()} for s in ss]
        entries = {number: packed[i] for i, number in enumerate(numbers)}
        known = {id(t): (n, float(read_number(optimizers, n))) for n, t in entries.items()}
        for p, g in zip(ps, gs):
            p.grad = g
        kept = dict[int, dict[str, Any]]()
        for (optimizer, begin), begun in zip(optimizers.begins(), start.members):
            name, clone = type(optimizer).__name__, _bare(begun)
            own = [[positions[id(p)] for p in group["params"] if id(p) in positions] for group in optimizer.param_groups]
            clone.param_groups = [
                _group_on_tensors(group, begin + i, entries, [ps[at] for at in own[i]])
                for i, group in enumerate(optimizer.param_groups)
            ]
            for at in (at for members in own for at in members):
                clone.state[ps[at]] = {**begun.state.get(stand_ins[at], {}), **ss[at]}
            before = _numbers_on_the_host(clone)
            with compiling(), _TensorNumbers(known) as mode:
                inspect.unwrap(type(optimizer).step)(clone)
            branches.extend(mode.branches)
            after = _numbers_on_the_host(clone)
            hidden[name] += [key for key in after if before.get(key) != after[key]]
            hidden[name] += [f"param_groups[{n.group - begin}][{n.key!r}]" for n in mode.written]
            for at in (at for members in own for at in members):
                kept[at] = state = clone.state[ps[at]]
                made[name].update(key for key in state.keys() - ss[at] if isinstance(state[key], Tensor))
        return ps, [kept[at][key] for at, s in enumerate(ss) for key in s]

    with torch.no_grad(), stand_ins[0].fake_mode:  # type: ignore[attr-defined]
        packed = torch.empty(len(numbers), dtype=torch.float64, device=params[0].device)
        gradients = [shaped_like(p) for p in params]
    try:
        with outside_dynamo():
            function = torch.func.functionalize(run, remove="mutations_and_views")
            traced = trace(function, (stand_ins, gradients, states, packed))
    except Exception as error:
        raise ValueError(
            f"{name}.step() cannot be traced into the compiled step: {str(error).splitlines()[0]}\n"
            "Use mkor_fx.compile(model) with your own loop: it works with every torch optimizer."
        ) from error
    for name, keys in made.items():
        if keys:
            raise ValueError(
                f"{name} creates its state ({', '.join(sorted(keys))}) inside step(), where it cannot be compiled. Call "
                "optimizer.step() once before compile_step, or use mkor_fx.compile(model) with your own loop."
            )
    for name, changed in hidden.items():
        if changed:
            raise ValueError(
                f"{name}.step() changes {', '.join(dict.fromkeys(changed))}, which a compiled step would never see change: "
                "keep it as a tensor in optimizer.state, or use mkor_fx.compile(model) with your own loop."
            )
    forget_values(traced.module)
    return Update(traced.module, states, tuple(dict.fromkeys(branches)))


def _numbers_on_the_host(optimizer: Optimizer) -> dict[str, Any]:
    """Every Python number that a step could count in: on the optimizer, in its groups and in its state."""
    places = {f"self.{key}": value for key, value in vars(optimizer).items()}
    for i, group in enumerate(optimizer.param_groups):
        places |= {f"param_groups[{i}][{key!r}]": value for key, value in group.items()}
    for i, state in enumerate(optimizer.state.values()):
        places |= {f"state {i}[{key!r}]": value for key, value in state.items()}
    return {place: value for place, value in places.items() if isinstance(value, (int, float, bool))}


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
