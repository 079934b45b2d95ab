"""What is computed from numbers of an optimizer alone, and branches on it: answered at trace time, watched from then on."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ...runtime.optimizer_state import Number, read_number
from ...runtime.optimizers import Groups

#: what keeps the value of numbers known, by the names that torch has for it
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "radd": lambda a, b: b + a, "sub": operator.sub, "rsub": lambda a, b: b - a, "mul": operator.mul,
    "rmul": lambda a, b: b * a, "div": operator.truediv, "truediv": operator.truediv, "true_divide": operator.truediv,
    "rdiv": lambda a, b: b / a, "rtruediv": lambda a, b: b / a, "pow": operator.pow, "rpow": lambda a, b: b**a,
    "floordiv": operator.floordiv, "floor_divide": operator.floordiv, "rfloordiv": lambda a, b: b // a, "neg": operator.neg,
    "mod": operator.mod, "remainder": operator.mod, "rmod": lambda a, b: b % a, "abs": abs, "sqrt": math.sqrt,
    "exp": math.exp, "log": math.log, "sin": math.sin, "cos": math.cos, "tanh": math.tanh, "log2": math.log2,
    "log10": math.log10, "expm1": math.expm1, "log1p": math.log1p, "max": max, "min": min,
}  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """Computed from numbers of the optimizer alone."""

    operation: str
    operands: tuple[Any, ...]


def value_of(expression: Any, optimizers: Groups) -> Any:
    """The present value of a number, of what is computed from numbers, or of a constant."""
    if isinstance(expression, Number):
        return float(read_number(optimizers, expression))
    if isinstance(expression, Derived):
        operands = [value_of(operand, optimizers) for operand in expression.operands]
        return OPERATIONS[expression.operation](*operands)
    return expression


@dataclass(frozen=True)
class Branch:
    """``left <operator> right`` was ``answer`` when the update was traced."""

    left: Any
    operator: str
    right: Any
    answer: bool

    def holds(self, optimizers: Groups) -> bool:
        try:
            left, right = value_of(self.left, optimizers), value_of(self.right, optimizers)
            return bool(getattr(operator, self.operator)(left, right)) == self.answer
        except (ArithmeticError, ValueError, LookupError):
            return False

    def depends_on(self, numbers: Collection[Number]) -> bool:
        return any(_depends(side, numbers) for side in (self.left, self.right))


def _depends(expression: Any, numbers: Collection[Number]) -> bool:
    operands = expression.operands if isinstance(expression, Derived) else ()
    return expression in numbers or any(_depends(operand, numbers) for operand in operands)
