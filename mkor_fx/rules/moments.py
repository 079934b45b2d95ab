"""Moments of gradients, and of what the factors have made of them. Shape suffixes: ``O`` outputs, ``I`` inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..prims import stored
from .base import State
from .direction import Gradient, Normalized
from .mkor_options import MKOROptions


class Moments(MKOROptions):
    """The part of :class:`MKOR` behind its factors: momentum, and how long a step is."""

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        if not self.keeps_momentum:
            return state
        names = {"momentum": grad.weight, "bias_momentum": grad.bias}
        mu: Any = self.momentum
        sums = {k: mu * state[k] + g.to(state[k].dtype) for k, g in names.items() if g is not None and k in state}
        if self.beta2:
            sums["square"] = average_square(state["square"], grad.weight, self.beta2)
            sums["steps"] = state["steps"] + 1
        return {**state, **sums}

    def overrides(self, function: str) -> bool:
        optional = dict.fromkeys(("advance", "moment"), self.keeps_momentum)
        optional |= dict.fromkeys(("normalize", "adam_rms"), bool(self.beta2))
        return super().overrides(function) and optional.get(function, True)

    def moment(self, state: State, grad: Gradient) -> Gradient:
        if not self.keeps_momentum:
            return grad
        pairs = (("momentum", grad.weight), ("bias_momentum", grad.bias))
        return Gradient(*(self._moment(state.get(name), raw) for name, raw in pairs))

    def _moment(self, held: Tensor | None, raw: Tensor | None) -> Any:
        if held is None or raw is None:
            return raw
        mu: Any = self.momentum
        ahead = raw.to(held.dtype) + mu * held if self.nesterov else held
        return ahead.to(raw.dtype)

    def adam_rms(self, state: State, moment: Gradient) -> Tensor | None:
        if not self.beta2:
            return None
        mu: Any = self.momentum
        return adam_rms(moment.weight, state["square"], state["steps"], mu, self.nesterov, self.beta2)

    def normalize(self, state: State, product: Tensor, moment: Tensor) -> Normalized:
        if not self.beta2:
            return Normalized(product, state)
        return normalized(product, moment, state, self.beta2)


def normalized(product_OI: Tensor, moment_OI: Tensor, state: State, beta2: float) -> Normalized:
    """``D / sqrt(r c)`` and the new ``r`` and ``c``, the ``row_squares`` and ``column_squares`` of ``state``.

    ``r`` is a moving average of the mean squares of ``D``'s rows, ``c`` of those of the columns of ``D / sqrt(r)``, each
    over the mean of all: Adafactor's factored second moments (Shazeer and Stern, 2018, arXiv 1804.04235), blind to scale.
    Both start at zero, which costs all entries the same. Of a ``D`` of zeros nothing is taken.
    """
    rows_O, columns_I = state["row_squares"], state["column_squares"]
    wide = product_OI.to(rows_O.dtype)
    rows_O, row_scale_O = _averaged(rows_O, wide.square().mean(1), beta2)
    scaled = wide * row_scale_O[:, None]
    squares_I, gains_I = scaled.square().mean(0), (scaled * moment_OI.to(wide.dtype)).sum(0)  # one pass
    columns_I, column_scale_I = _averaged(columns_I, squares_I, beta2)
    made = product_OI * row_scale_O.to(product_OI.dtype)[:, None] * column_scale_I.to(product_OI.dtype)
    rms, gain = (squares_I * column_scale_I.square()).mean().sqrt(), (gains_I * column_scale_I).sum()
    return Normalized(made, {**state, "row_squares": rows_O, "column_squares": columns_I}, rms, gain)


def _averaged(average: Tensor, squares: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """The average moved on, and the root of its inverse, zero where there was nothing yet."""
    whole = squares.mean()
    moved = beta2 * average + (1 - beta2) * squares / whole
    new = torch.where(torch.isfinite(whole) & (whole > 0), moved, average)
    return new, stored(torch.where(new > 0, new.rsqrt(), torch.zeros_like(new)))


def average_square(average: Tensor, gradient_OI: Tensor, beta2: float) -> Tensor:
    """The moving average of a gradient's mean square, one step on."""
    return beta2 * average + (1 - beta2) * gradient_OI.to(average.dtype).square().mean()


def adam_rms(
    moment_OI: Tensor, square: Tensor, steps: Tensor, momentum: float, nesterov: bool, beta2: float
) -> Tensor:
    """``|m| / sqrt(O I v)``, 0-dim: what the update of Adam would have as its root mean square, if one second moment ``v``
    served all of the matrix (Kingma and Ba, 2014, arXiv 1412.6980, bias corrections included).

    ``moment_OI`` is ``G + mu B`` (``nesterov``) or ``B`` of the sum ``B <- mu B + G`` over ``steps``, of which ``m`` is the
    average; ``square`` is that of ``|G|^2 / (O I)`` from zero.
    """
    taken = steps.to(square.dtype)
    share = (1 - momentum) / (1 - momentum ** (taken + nesterov))
    mean = (square / (1 - beta2**taken)).sqrt()
    return share * moment_OI.to(square.dtype).square().mean().sqrt() / mean
