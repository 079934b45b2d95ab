"""Code written for Python numbers, run on 0-dim tensors: an optimizer's rates, betas and counts of steps while it is traced.

A number that the user may change between steps is an entry of a packed tensor; what is computed from such numbers alone
keeps its value as well, so that a branch on it is answered at trace time and watched. So is one on a count in the
groups, which the step itself changes: it is another program where the answer is another. A number of the state, or one
that is read from a tensor (``x.item()``), has no value on the host: a branch on it is refused by name.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...runtime.optimizer_state import Number
from ..torch_api.tracing import shaped_like
from .watched_branches import OPERATIONS, Branch, Derived
from .without_host import Refused, without_host

COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
#: ``x += y`` as torch hears of it: of a number it binds another one, of a tensor it changes it
REBINDING = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "pow_": "pow", "floor_divide_": "floor_divide",
             "remainder_": "remainder"}  # fmt: skip
REBINDING |= {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__idiv__": "div", "__itruediv__": "div",
              "__ipow__": "pow", "__ifloordiv__": "floor_divide", "__imod__": "remainder"}  # fmt: skip
#: functions of ``math`` that torch has under the same name
MATH = ("sqrt", "pow", "exp", "log", "sin", "cos", "tanh", "log2", "log10", "expm1", "log1p")
REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
READS = {"__float__", "__int__", "__index__", "__bool__", "item"}


@dataclass(frozen=True)
class PythonNumber:
    """What a 0-dim tensor stands for. ``expression`` and ``value`` are None where only the device knows it; ``python``: the
    optimizer itself has a Python number there; ``counts``: it is another one in each step; ``origin``: what it comes
    from, for a message."""

    tensor: Tensor
    expression: Any = None
    value: Any = None
    python: bool = True
    counts: bool = False
    origin: str = ""


class PythonNumbers(TorchFunctionMode):
    """No ``.item()``, no data-dependent branch. ``params`` say that they require gradients, as an optimizer's do.
    ``branches`` are those that were answered, ``written`` the numbers of the optimizer that were changed in place."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.trained = {id(p): p for p in params}
        self.known: dict[int, PythonNumber] = {}
        self.branches: list[Branch] = []
        self.written: list[Number] = []
        self.foreign: dict[int, Tensor] = {}
        self._plainly = False

    def hold(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor that the optimizer holds, and no program is passed."""
        held = shaped_like(tensor)
        self.foreign[id(held)] = held
        return held

    def add(self, known: PythonNumber) -> None:
        self.known[id(known.tensor)] = known

    def of(self, value: Any) -> PythonNumber | None:
        return self.known.get(id(value)) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        full = getattr(func, "__name__", "")
        if self._plainly:
            return func(*args, **kwargs)
        if full == "__get__" and func == REQUIRES_GRAD and id(args[0]) in self.trained:
            return True
        if self.foreign and any(id(each) in self.foreign for each in tree_leaves((args, kwargs))):
            if full == "__get__" and not isinstance(attribute := func(*args, **kwargs), Tensor):
                return attribute
            raise Refused(f"it uses a tensor of its own, in {full}")
        name, first = full.strip("_"), self.of(args[0]) if args else None
        if full in REBINDING and first is not None and first.python:
            name = full = REBINDING[full]
            func = getattr(torch, name)
        elif (full.endswith("_") and not full.endswith("__")) or full in REBINDING or full == "__setitem__":
            self._note_written(args)
        if full in READS and len(args) == 1:
            if full == "item" and args[0].dtype is not torch.bool:
                return self.number(args[0], copy=True)
            if first is not None:
                return self._read(first, name)
        operands = [self._operand(arg) for arg in args]
        if operands and not kwargs and None not in operands and any(self.of(arg) for arg in args):
            if name in COMPARISONS and len(operands) == 2:
                return self._decide(name, *operands)  # type: ignore[arg-type]
            if name in OPERATIONS:
                return self._derive(name, operands, func(*args))  # type: ignore[arg-type]
        return without_host(func, full, args, kwargs)

    def number(self, tensor: Tensor, copy: bool = False) -> Tensor:
        """What Python has where it reads a tensor of one element: 0-dim, in float64."""
        known = self.of(tensor)
        if known is not None and known.python and not copy:
            return tensor
        number = tensor.reshape(()).to(torch.float64, copy=True)
        if known is not None:
            self.add(replace(known, tensor=number, python=True))
        else:
            self.add(PythonNumber(number, origin="a value of a tensor"))
        return number

    def _note_written(self, args: tuple) -> None:
        targets = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
        for known in filter(None, map(self.of, targets)):
            del self.known[id(known.tensor)]
            if isinstance(known.expression, Number):
                self.written.append(known.expression)

    def _operand(self, value: Any) -> PythonNumber | None:
        if isinstance(value, (int, float)):
            return PythonNumber(None, value, value)  # type: ignore[arg-type]
        return self.of(value)

    def _decide(self, name: str, left: PythonNumber, right: PythonNumber) -> bool:
        for known in (left, right):
            if known.expression is None:
                raise Refused(f"it branches on {known.origin}, which only the device knows")
        answer = bool(getattr(operator, name)(left.value, right.value))
        self.branches.append(Branch(left.expression, name, right.expression, answer))
        return answer

    def _read(self, known: PythonNumber, name: str) -> Any:
        """A number that code wants on the host: a constant of the program, as long as it does not change."""
        if name == "bool":
            return self._decide("ne", known, self._operand(0))  # type: ignore[arg-type]
        if known.expression is None or known.counts:
            raise Refused(f"it reads {known.origin} on the host, as {name}()")
        self.branches.append(Branch(known.expression, "eq", known.value, True))
        return int(known.value) if name in ("int", "index") else float(known.value)

    def _derive(self, name: str, operands: list[PythonNumber], result: Any) -> Any:
        if isinstance(result, Tensor) and not result.dim():
            expression = value = None
            if all(operand.expression is not None for operand in operands):
                with contextlib.suppress(ArithmeticError, ValueError):
                    value = OPERATIONS[name](*(operand.value for operand in operands))
                    expression = Derived(name, tuple(operand.expression for operand in operands))
            origin = next((operand.origin for operand in operands if operand.expression is None or operand.counts), "")
            python, counts = (when(getattr(o, name) for o in operands) for when, name in ((all, "python"), (any, "counts")))
            self.add(PythonNumber(result, expression, value, python, counts, origin))
        return result

    # ---- functions of Python that torch does not hear of ----------------------------------------------------------------

    def _extreme(self, name: str, args: tuple) -> Any:
        """Python's ``max`` and ``min`` of numbers: the first of the largest."""
        like = next(arg for arg in args if isinstance(arg, Tensor))
        best = args[0]
        for other in args[1:]:
            pair = [t if isinstance(t, Tensor) else like.new_full((), t, dtype=torch.float64) for t in (other, best)]
            self._plainly = True
            try:
                result = torch.where((torch.gt if name == "max" else torch.lt)(*pair), *pair)
            finally:
                self._plainly = False
            best = self._derive(name, [self._operand(best), self._operand(other)], result)  # type: ignore[list-item]
        return best

    @contextlib.contextmanager
    def hears(self) -> Iterator[None]:
        """While it lasts, ``math``, ``max`` and ``min`` take such numbers in this thread, and give 0-dim tensors; sets and
        dicts, which would know a tensor by its identity, refuse them."""
        thread = threading.get_ident()

        def function(name: str, plain: Callable) -> Callable:
            def heard(*args: Any) -> Any:
                if threading.get_ident() != thread or not any(isinstance(arg, Tensor) for arg in args):
                    return plain(*args)
                if name == "log" and len(args) == 2:
                    return heard(args[0]) / heard(args[1])
                return getattr(torch, name)(*(self.number(arg) if isinstance(arg, Tensor) else arg for arg in args))

            return heard

        def extreme(name: str, plain: Callable) -> Callable:
            def heard(*args: Any, **kwargs: Any) -> Any:
                ours = threading.get_ident() == thread and len(args) > 1 and not kwargs
                if ours and any(map(self.of, args)) and all(map(self._operand, args)):
                    return self._extreme(name, args)
                return plain(*args, **kwargs)

            return heard

        def hashed(tensor: Tensor) -> int:
            if threading.get_ident() == thread and (known := self.of(tensor)) is not None and known.python:
                raise Refused(f"it looks {known.origin or 'a number'} up in a set or a dict")
            return id(tensor)

        made: dict[tuple[Any, str], Callable] = {(Tensor, "__hash__"): hashed}
        made |= {(math, name): function(name, getattr(math, name)) for name in MATH}
        made |= {(builtins, name): extreme(name, getattr(builtins, name)) for name in ("max", "min")}
        plain = {place: getattr(*place) for place in made}
        try:
            for (module, name), heard in made.items():
                setattr(module, name, heard)
            yield
        finally:
            for (module, name), before in plain.items():
                setattr(module, name, before)
