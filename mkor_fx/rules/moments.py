"""Moments of what the factors have made of a gradient. Shape suffixes: ``O`` outputs, ``I`` inputs of one weight."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(
    product_OI: Tensor, rows_O: Tensor, columns_I: Tensor, beta2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``D / sqrt(r c)``, its root mean square, and the new ``r`` and ``c``.

    ``r`` is a moving average of the mean squares of ``D``'s rows, ``c`` of those of the columns of ``D / sqrt(r)``, each
    over the mean of all: Adafactor's factored second moments (Shazeer and Stern, 2018, arXiv 1804.04235), blind to scale.
    Both start at zero, which costs all entries the same. Of a ``D`` of zeros nothing is taken.
    """
    wide = product_OI.to(rows_O.dtype)
    rows_O, row_scale_O = _averaged(rows_O, wide.square().mean(1), beta2)
    squares_I = (wide * row_scale_O[:, None]).square().mean(0)
    columns_I, column_scale_I = _averaged(columns_I, squares_I, beta2)
    made = product_OI * row_scale_O.to(product_OI.dtype)[:, None] * column_scale_I.to(product_OI.dtype)
    return made, (squares_I * column_scale_I.square()).mean().sqrt(), rows_O, columns_I


def _averaged(average: Tensor, squares: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """The average moved on, and the root of its inverse, zero where there was nothing yet."""
    whole = squares.mean()
    moved = beta2 * average + (1 - beta2) * squares / whole
    new = torch.where(torch.isfinite(whole) & (whole > 0), moved, average)
    return new, torch.where(new > 0, new.rsqrt(), torch.zeros_like(new))


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
