"""From the two sides of a rule to a direction of the right size: the library's part of every rule.

Shape suffixes: ``I`` inputs, ``O`` outputs of one weight.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..hardware import multiplies
from ..prims import accumulation_dtype, graft_rms, precondition, rescale
from .results import check_direction, check_normalized, check_sides

Graft = Literal["gradient", "rms"]
#: beside those that a rule can ask for: by what its two sides multiply, and as long as Adam's own step
Size = Literal["gradient", "rms", "moment", "adam"]
#: the share of a weight's norm that a step longer than 0.2 may move it by
STRIDE = 0.03
#: how many times longer than Adam's a step may be, to gain as much
STRETCH = 8.0


class Gradient(NamedTuple):
    """``weight`` is ``[O, I]`` whatever way the parameter is stored; ``bias`` is ``[O]`` or None."""

    weight: Tensor
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: t for name, t in self._asdict().items() if t is not None}

    def to(self, dtype: torch.dtype) -> Gradient:
        return Gradient(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class Normalized(NamedTuple):
    """What a rule makes of the product of its two sides, ``[O, I]``, and its new state. ``rms``, the root mean square, and
    ``gain``, the inner product with the moment, both 0-dim, are the library's to compute where they are None."""

    direction: Tensor
    state: dict[str, Tensor]
    rms: Tensor | None = None
    gain: Tensor | None = None


class Sides(NamedTuple):
    """The direction is ``left @ G @ right``: symmetric ``[O, O]`` and ``[I, I]``; None is the identity. That of a bias is
    ``left @ b``, or the last column of a rule with a ``joint_bias``."""

    left: Tensor | None
    right: Tensor | None


def direction_of(
    rule: Any, state: dict[str, Tensor], grad: Gradient, by: Size | None, longest: Tensor | None = None
) -> tuple[Gradient, dict[str, Tensor]]:
    """What a rule makes of a gradient, sized ``by``; None: as it is. And what its state is from then on. ``longest`` bounds
    sizes ``by="adam"``.

    Raises:
        WrongResult: a function of the rule has returned what is no direction for it.
    """
    if not rule.overrides("precondition"):
        return from_sides(rule, state, grad, by, longest)
    made = rule.precondition(state, grad)
    check_direction(rule, "precondition", made, grad)
    weight, bias = made.weight.to(grad.weight.dtype), made.bias
    if bias is None or grad.bias is None:
        return Gradient(_sized(weight, grad.weight, by)), state
    made = Gradient(weight, bias.to(grad.bias.dtype))
    if rule.joint_bias:
        together = _sized(joined(made), joined(grad), by)
        return Gradient(together[:, :-1], together[:, -1]), state
    return Gradient(_sized(weight, grad.weight, by), _sized(bias[:, None], grad.bias[:, None], by)[:, 0]), state


def from_sides(
    rule: Any, state: dict[str, Tensor], raw: Gradient, graft: Size | None, longest: Tensor | None = None
) -> tuple[Gradient, dict[str, Tensor]]:
    """``left @ moment @ right``, ``normalize``d, sized by ``graft`` and the ``raw`` gradient; and the new state."""
    sides, grad = rule.sides(state), rule.moment(state, raw)
    check_direction(rule, "moment", grad, raw)
    if graft == "moment":
        raw, graft = grad, "gradient"
    adam = rule.adam_rms(state, grad) if graft == "adam" and longest is not None else None
    joint = rule.joint_bias and raw.bias is not None
    check_sides(rule, sides, joined(grad) if joint else grad.weight)
    left, right = sides
    dtype, bias = rule.product_dtype, grad.bias
    moment = joined(grad) if joint else grad.weight
    product, new, rms, gain = _product(left, moment, right, dtype), state, None, None
    if rule.overrides("normalize"):
        made, new, rms, gain = check_normalized(rule, rule.normalize(state, product, moment), product, state)
        product = made.to(product.dtype)
    to = None if adam is None or longest is None else _length_of_step(adam, longest, _cosine(product, moment, rms, gain))
    if joint:
        together = _sized(product, joined(raw), graft, rms, to)
        return Gradient(together[:, :-1], together[:, -1]), new
    weight = _sized(product, raw.weight, graft, rms, to)
    if bias is None or raw.bias is None:
        return Gradient(weight), new
    if left is not None or bias is not raw.bias:  # without either it stays as it is
        column = bias[:, None]
        sized_by = column if raw.bias is bias else raw.bias[:, None]
        bias = _sized(column if left is None else _product(left, column, None, dtype), sized_by, graft, to=to)[:, 0]
    return Gradient(weight, bias), new


def product_dtype_of(
    chosen: torch.dtype | Literal["fast"] | None, grad: torch.dtype, device: torch.device
) -> torch.dtype:
    """What a rule's ``product_dtype`` comes to for gradients of a dtype on a device."""
    if chosen == "fast":
        return torch.bfloat16 if grad == torch.float32 and multiplies(device, torch.bfloat16) else grad
    return grad if chosen is None else chosen


def _product(
    left: Tensor | None, grad: Tensor, right: Tensor | None, chosen: torch.dtype | Literal["fast"] | None
) -> Tensor:
    return precondition(left, grad.to(product_dtype_of(chosen, grad.dtype, grad.device)), right).to(grad.dtype)


def _sized(
    direction: Tensor, grad: Tensor, graft: Size | None, rms: Tensor | None = None, to: Tensor | None = None
) -> Tensor:
    """``rms`` is the direction's root mean square, where it is known, ``to`` what it is brought to where it is not 0.2."""
    if graft == "gradient":
        return rescale(direction, grad, rms)
    return direction if graft is None else graft_rms(direction, rms, to)


def _length_of_step(adam: Tensor, longest: Tensor, cosine: Tensor) -> Tensor:
    """The root mean square with which a step gains to first order what Adam's own would, ``adam`` over its cosine with the
    moment, but no more than ``longest`` and no less than 0.2."""
    wanted = adam / cosine
    usable = torch.isfinite(wanted)
    return torch.where(usable, torch.minimum(wanted, longest.to(wanted.dtype)), torch.zeros_like(wanted)).clamp_min(0.2)


def _cosine(direction: Tensor, moment: Tensor, rms: Tensor | None, gain: Tensor | None) -> Tensor:
    """Of the angle between a direction and what it was made of, from ``1 / STRETCH`` to 1; what is not finite is 1."""
    dtype = accumulation_dtype(direction.dtype)
    wide, held = direction.to(dtype), moment.to(dtype)
    if gain is None:
        gain = (wide * held).sum()
    if rms is None:
        rms = wide.square().mean().sqrt()
    cosine = gain.to(dtype) / (direction.numel() * rms.to(dtype) * held.square().mean().sqrt())
    return torch.where(torch.isfinite(cosine), cosine.clamp(1 / STRETCH, 1), torch.ones_like(cosine))


def joined(grad: Gradient) -> Tensor:
    """``[W | b]``, ``[O, I + 1]``"""
    assert grad.bias is not None
    return torch.cat([grad.weight, grad.bias[:, None]], 1)
