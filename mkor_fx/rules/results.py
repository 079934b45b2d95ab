"""What the functions of a rule return, held to the contract while a program is written: it costs a step nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .hyper import describe_rule


def too_few_slots(rule: Any, what: str, slots: int, there: int) -> str:
    """What is to be said of a rule that gathers what it has no room for."""
    return f"{describe_rule(rule)} gathers the summaries of {slots} {what}, and there are {there}: tell it how many"


class WrongResult(ValueError):
    """A function of a rule has returned what the contract does not allow."""


def check_state(rule: Any, function: str, new: object, old: dict[str, Tensor]) -> None:
    """``new`` has the entries of ``old``, in their shapes.

    Raises:
        WrongResult: it has not; says what differs.
    """
    where = f"{type(rule).__name__}.{function}"
    if not isinstance(new, dict):
        raise WrongResult(f"{where} returned {_shown(new)}: must be the whole state, a dict with {', '.join(old)}")
    wrong = [f"no {name!r}" for name in old if name not in new]
    wrong += [f"{name!r}, which init has not made" for name in new if name not in old]
    wrong += [
        f"{name!r} as {_shown(new[name])} in the place of {_shown(t)}"
        for name, t in old.items()
        if name in new and not (isinstance(new[name], Tensor) and new[name].shape == t.shape)
    ]
    if wrong:
        raise WrongResult(f"{where} returned {'; '.join(wrong)}: must be the whole state, each entry in the shape it has")


def check_direction(rule: Any, function: str, made: Any, grad: Any) -> None:
    """``made`` is a direction for ``grad``: a pair of weight and bias in their shapes."""
    where = f"{type(rule).__name__}.{function}"
    if not isinstance(made, tuple) or len(made) != 2:
        raise WrongResult(f"{where} returned {_shown(made)}: must be a Gradient(weight, bias)")
    for part, direction, raw in zip(("weight", "bias"), made, grad):
        if _shape(direction) != _shape(raw):
            raise WrongResult(
                f"{where} returned a {part} of {_shown(direction)}, where the gradient has {_shown(raw)}: must be alike"
            )


def check_normalized(rule: Any, made: Any, product: Tensor, state: dict[str, Tensor]) -> Any:
    """``made`` is what ``normalize`` may make of a ``product``: a matrix alike, the state, numbers of the matrix or None."""
    where = f"{type(rule).__name__}.normalize"
    if not isinstance(made, tuple) or len(made) != 4:
        raise WrongResult(f"{where} returned {_shown(made)}: must be Normalized(direction, state), with rms, gain")
    direction, new, *known = made
    if _shape(direction) != _shape(product):
        raise WrongResult(f"{where} returned {_shown(direction)} in the place of {_shown(product)}: must be alike")
    for name, number in zip(("root mean square", "gain"), known):
        if number is not None and _shape(number) != ():
            raise WrongResult(f"{where} returned {_shown(number)} as the {name}: must be a 0-dim tensor, or None")
    check_state(rule, "normalize", new, state)
    return made


def check_sides(rule: Any, made: Any, grad: Tensor) -> None:
    """``made`` are the sides of a direction for a ``grad`` ``[O, I]``."""
    if not isinstance(made, tuple) or len(made) != 2:
        raise WrongResult(f"{type(rule).__name__}.sides returned {_shown(made)}: must be Sides(left, right)")
    for name, side, size in zip(("left", "right"), made, grad.shape):
        if side is not None and _shape(side) != (size, size):
            raise WrongResult(
                f"{type(rule).__name__}.sides returned a {name} side of {_shown(side)}: must be [{size}, {size}] here, or "
                "None"
            )


def check_summary(rule: Any, made: Any, shapes: Sequence[torch.Size]) -> None:
    """``made`` are sums over rows: of the same ``shapes`` whatever their number is."""
    where = f"{type(rule).__name__}.summarize"
    if not isinstance(made, tuple):
        raise WrongResult(f"{where} returned {_shown(made)}: must be a tuple of tensors")
    if [_shape(t) for t in made] != [tuple(shape) for shape in shapes]:
        made_of_one = ", ".join(f"a tensor {list(shape)}" for shape in shapes) or "nothing"
        raise WrongResult(
            f"{where} returned {', '.join(map(_shown, made)) or 'nothing'}, and of one row {made_of_one}: must be sums over "
            "rows, of shapes that do not depend on their number"
        )


def _shape(value: Any) -> tuple | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _shown(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"[:60]
