"""Linear layers and adapters of a Kronecker product (KronA: Edalati et al., 2022, arXiv 2212.10650)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Kronecker(nn.Module):
    """``y = x W^T + b`` with ``W = s (A x B)``, or ``W = W0 + s (A x B)`` beside a frozen ``W0``; ``W`` is never formed.

    ``A`` is ``[a1, a2]``, ``B`` is ``[b1, b2]``, ``a1 b1 = O``, ``a2 b2 = I``, and each input is a matrix ``X [a2, b2]``:

        ``W[i b1 + k, j b2 + l] = s A[i, j] B[k, l]``
        ``y = s vec(A X B^T)``, in two products: ``T = X B^T``, then ``A T``

    That takes ``N (a2 b1 b2 + a1 a2 b1)`` multiplications for ``N`` inputs instead of ``N O I``, and ``a1 a2 + b1 b2``
    numbers instead of ``O I``, while the rank of ``A x B`` is the product of their ranks. Both products are matched: ``A``
    is a weight of ``N b1`` rows and ``B`` one of ``N a2``. What sizes a step by the norm of a weight or of its gradient
    sees each factor by itself, although ``c A`` and ``B / c`` are the same layer.

    A layer starts with both factors uniform, of variances ``1 / (sqrt(3) a2)`` and ``1 / (sqrt(3) b2)``: at ``s = 1``
    entries of ``W`` have the ``1 / (3 I)`` of ``nn.Linear``. An adapter starts at ``W0``: one factor is zero and the other
    as the weight of an ``nn.Linear`` of its shape. With both at zero no gradient would flow.

    Args:
        in_features, out_features: ``I``, ``O``; ``[*, I]`` becomes ``[*, O]``.
        bias: whether the layer has a bias ``b [O]`` of its own; an adapter has its base's.
        left: the shape ``(a1, a2)`` of ``A``, divisors of ``O`` and of ``I``. None: of each the largest that is not above
            the square root, so that ``A`` is the smaller factor.
        scale: ``s``, not zero. LoKr's ``alpha / r``.
        base: the frozen layer that this one adapts; its parameters are no longer trained. See :meth:`adapt`.
        zero: of an adapter the factor that starts at zero, ``"left"`` (LoKr, arXiv 2309.14859) or ``"right"``.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes without such factors, a factor of a single number, an option outside its range; named.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, left: tuple[int, int] | None = None,
        scale: float = 1.0, base: nn.Linear | None = None, zero: Literal["left", "right"] = "left", **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        a1, a2 = _left_shape(in_features, out_features, left)
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"Kronecker(scale={scale!r}): must be a finite number other than 0, which no gradient passes")
        if zero not in ("left", "right"):
            raise ValueError(f"Kronecker(zero={zero!r}): the factor of an adapter that starts at zero, 'left' or 'right'")
        if base is not None:
            _check_base(base, in_features, out_features)
            base.requires_grad_(False)
        self.in_features, self.out_features, self.scale, self.zero = in_features, out_features, scale, zero
        self.base = base
        self.A = nn.Parameter(torch.empty(a1, a2, **factory))
        self.B = nn.Parameter(torch.empty(out_features // a1, in_features // a2, **factory))
        own_bias = bias and base is None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if own_bias else None
        self.reset_parameters()

    @classmethod
    def adapt(cls, linear: nn.Linear, **options: Any) -> Kronecker:
        """The adapter of a trained layer, at first equal to it. ``linear`` becomes its ``base`` and is frozen.

        Args:
            linear: the layer ``W0``, with its bias.
            options: ``left``, ``scale``, ``zero``.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"Kronecker.adapt({type(linear).__name__}): needs an nn.Linear, of which W0 is the weight")
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        return cls(linear.in_features, linear.out_features, base=linear, **{**like, **options})

    def reset_parameters(self) -> None:
        """Fresh random factors, and a bias as that of ``nn.Linear``."""
        for factor, name in ((self.A, "left"), (self.B, "right")):
            bound = factor.shape[1] ** -0.5 * (3**0.25 if self.base is None else 1)
            if self.base is not None and self.zero == name:
                nn.init.zeros_(factor)
            else:
                nn.init.uniform_(factor, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[*, I] -> [*, O]``"""
        (a1, a2), (b1, b2) = self.A.shape, self.B.shape
        if x.shape[-1] != a2 * b2:
            raise ValueError(f"Kronecker: inputs of {x.shape[-1]} features, needs in_features={a2 * b2}")
        T = F.linear(x.unflatten(-1, (a2, b2)), self.B)  # [*, a2, b1]
        y = F.linear(T.mT, self.A).mT.reshape(*x.shape[:-1], a1 * b1)
        if self.scale != 1:
            y = self.scale * y
        if self.base is not None:
            return self.base(x) + y
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """``W``, ``[O, I]``, detached; computed in float32 at least."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        W = self.scale * torch.kron(self.A.to(wide), self.B.to(wide))
        return (W if self.base is None else self.base.weight.to(wide) + W).to(self.A.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain layer with the same outputs, whose parameters are copies."""
        bias = self.bias if self.base is None else self.base.bias
        like = {"device": self.A.device, "dtype": self.A.dtype}
        merged = nn.Linear(self.in_features, self.out_features, bias is not None, **like)
        merged.weight.copy_(self.materialise())
        if bias is not None:
            merged.bias.copy_(bias)
        return merged

    def extra_repr(self) -> str:
        shapes = f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, bias={self.bias is not None}"
        return f"{self.in_features}, {self.out_features}, {shapes}" + (f", scale={self.scale}" if self.scale != 1 else "")


def largest_divisor(n: int) -> int:
    """The largest divisor that is not above the square root."""
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)


def _left_shape(inputs: int, outputs: int, left: tuple[int, int] | None) -> tuple[int, int]:
    if inputs < 1 or outputs < 1:
        raise ValueError(f"Kronecker(in_features={inputs}, out_features={outputs}): must be at least 1")
    a1, a2 = left or (largest_divisor(outputs), largest_divisor(inputs))
    if a1 < 1 or a2 < 1 or outputs % a1 or inputs % a2:
        raise ValueError(
            f"Kronecker(left={(a1, a2)}): the shape of A must divide (out_features, in_features) = {(outputs, inputs)}"
        )
    if a1 * a2 in (1, outputs * inputs):
        why = "both sizes are prime" if left is None else f"left={left}"
        raise ValueError(
            f"Kronecker({inputs}, {outputs}): {why}, which leaves a single number for one factor. Use nn.Linear, or sizes "
            "with divisors, for instance padded to an even number"
        )
    return a1, a2


def _check_base(base: nn.Linear, inputs: int, outputs: int) -> None:
    if not isinstance(base, nn.Linear):
        raise ValueError(f"Kronecker(base={type(base).__name__}): must be an nn.Linear")
    if base.weight.shape != (outputs, inputs):
        raise ValueError(f"Kronecker(base=): its weight is {tuple(base.weight.shape)}, needs {(outputs, inputs)}")
