"""What an optimizer's step changes besides tensors of its state: on the object, its class, in its groups, in containers, and
in variables of functions."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from .without_host import Refused

#: how deep objects within an optimizer are looked into
DEPTH = 4
#: how many of an optimizer's functions are
FUNCTIONS = 500
_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_WHOLE = (Tensor, nn.Module, Optimizer, *_CODE)


class Place(NamedTuple):
    """Where something may change: an attribute, an entry of a ``group`` or of a parameter's state."""

    name: str
    key: str
    group: int | None = None
    of_state: bool = False


def own_copy(value: Any, tensors: Callable[[Tensor], Tensor], depth: int = DEPTH) -> Any:
    """A copy that a trial step may change: of containers, of plain objects and by ``tensors`` of tensors; not of parameters,
    modules and functions."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return tensors(value)
    if depth == 0 or isinstance(value, _WHOLE):
        return value
    each = lambda inner: own_copy(inner, tensors, depth - 1)
    if type(value) in (list, set, tuple):
        return type(value)(map(each, value))
    if isinstance(value, deque):
        return deque(map(each, value), value.maxlen)
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update((key, each(inner)) for key, inner in value.items())
        return found
    if hasattr(value, "tobytes"):
        return copy.copy(value)
    if hasattr(value, "__dict__") and not callable(value):
        found = copy.copy(value)
        vars(found).update((key, each(inner)) for key, inner in vars(value).items())
        return found
    return value


def snapshot(optimizer: Optimizer) -> dict[Place, Any]:
    """All that a step could keep a count in, by place."""
    found = {Place(f"self.{k}", ""): _frozen(v) for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    for cls in type(optimizer).__mro__:
        held = {k: v for k, v in vars(cls).items() if isinstance(v, (int, float, list, dict, set)) and k[:2] != "__"}
        found |= {Place(f"{cls.__name__}.{k}", ""): _frozen(v) for k, v in held.items()}
    for owner, function in functions(optimizer):
        found |= {Place(f"{name}, a variable of {owner}", ""): _frozen(value) for name, value in _variables(function)}
    found[Place("the state of Python's random numbers", "")] = hash(random.getstate())
    if (numpy := sys.modules.get("numpy")) is not None:
        found[Place("the state of numpy's random numbers", "")] = _frozen(numpy.random.get_state())
    for i, group in enumerate(optimizer.param_groups):
        found |= {Place(f"param_groups[{i}][{k!r}]", k, i): _frozen(v) for k, v in group.items() if k != "params"}
    for i, state in enumerate(optimizer.state.values()):
        if not isinstance(state, dict):
            raise Refused("it keeps state that is of no parameter")
        held = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        found |= {Place(f"state {i}[{k!r}]", k, of_state=True): _frozen(v) for k, v in held.items()}
    return found


def functions(optimizer: Optimizer) -> Iterator[tuple[str, types.FunctionType]]:
    """Those that an optimizer's step may call and that are not torch's: methods of its classes, functions that it
    holds, what these have closed over, and functions of their modules that they name; each with what leads there."""
    own = [cls for cls in type(optimizer).__mro__ if cls is not object and not _of_torch(cls)]
    held = [(f"{cls.__name__}.{name}", value) for cls in own for name, value in vars(cls).items()]
    held += [(f"self.{name}", value) for name, value in vars(optimizer).items()]
    seen: set[int] = set()
    while held:
        name, value = held.pop()
        value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) or hasattr(value, "__func__") else value
        if isinstance(value, functools.partial):
            value = value.func
        is_new = isinstance(value, types.FunctionType) and not _of_torch(value) and id(value) not in seen
        if is_new and len(seen) < FUNCTIONS:
            seen.add(id(value))
            yield name, value
            held += [(name, cell.cell_contents) for cell in _cells(value).values() if callable(cell.cell_contents)]
            named = [value.__globals__.get(other) for other in value.__code__.co_names]
            held += [(other.__qualname__, other) for other in named if isinstance(other, types.FunctionType)]


def _of_torch(held: Any) -> bool:
    return (getattr(held, "__module__", None) or "").partition(".")[0] == "torch"


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    """The variables around a function that have a value."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):
            _ = cell.cell_contents
            found[name] = cell
    return found


def _numbers_of_module(function: types.FunctionType) -> dict[str, Any]:
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name: value for name, value in named.items() if isinstance(value, (int, float))}


def _variables(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function may keep from call to call."""
    around = [(name, cell.cell_contents) for name, cell in _cells(function).items()]
    defaults = ("its defaults", (function.__defaults__, function.__kwdefaults__))
    return [*around, *_numbers_of_module(function).items(), defaults, *vars(function).items()]


@contextlib.contextmanager
def kept_numbers(optimizer: Optimizer) -> Iterator[None]:
    """Numbers in variables around functions are behind it what they were."""
    before = []
    for _, function in functions(optimizer):
        around = [(cell, cell.cell_contents) for cell in _cells(function).values()]
        numbers = [each for each in around if isinstance(each[1], (int, float))]
        before.append((function, numbers, _numbers_of_module(function)))
    try:
        yield
    finally:
        for function, numbers, of_module in before:
            function.__globals__.update(of_module)
            for cell, value in numbers:
                cell.cell_contents = value


def changed(before: Mapping[Place, Any], after: Mapping[Place, Any]) -> list[Place]:
    return [place for place in {**before, **after} if before.get(place) != after.get(place)]


def _frozen(value: Any, depth: int = DEPTH) -> Any:
    """What can be compared later: the contents of containers and objects, the identity of tensors."""
    if isinstance(value, _WHOLE) or depth == 0:
        return id(value)
    if isinstance(value, Mapping):
        return "mapping", tuple((repr(key), _frozen(each, depth - 1)) for key, each in value.items())
    if isinstance(value, (list, tuple, set, deque)):
        return type(value).__name__, tuple(_frozen(each, depth - 1) for each in value)
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if hasattr(value, "__dict__"):
        return type(value).__name__, _frozen(vars(value), depth - 1)
    return type(value).__name__, repr(value)
