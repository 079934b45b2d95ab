"""SMMF: Adam's moments as outer products of two vectors (Park et al., 2024, arXiv 2412.08894)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .decoupled import DecoupledOptimizer


class SMMF(DecoupledOptimizer):
    """Square-matricized momentum factorization, as in the authors' release.

    A tensor of ``n`` elements is seen as a matrix ``a x b``, ``b`` the largest divisor of ``n`` up to its root. Between
    steps the momentum ``M`` and the second moment ``V`` of that matrix are kept as a vector for its rows and one for its
    columns, the signs of ``M`` as one bit an element. With ``t`` the count of steps from 1:

        ``M <- b1 M + (1 - b1) g,   b1 = beta growth^(t-1)``
        ``V <- b2 V + (1 - b2) g^2,   b2 = 1 - t^decay``
        ``p <- p (1 - lr weight_decay) - lr M / (sqrt(V) + eps)``
        ``|M| ~ r c^T,   r = |M| 1,   c = 1^T |M| / sum(|M|)``, and ``V`` likewise

    ``b2`` is 0 in the first step: nothing needs a bias correction. A bias is a matrix like any other tensor; one of a prime
    number of elements is a column, whose factorization is exact and saves nothing.

    Args:
        params: parameters, or groups of them; every option below can differ from group to group.
        lr: learning rate.
        beta: weight of the old momentum in the first step, in [0, 1); None: no momentum, and no state for it.
        eps: added to the root, >= 0.
        weight_decay: decoupled, >= 0.
        decay: exponent of the second moment's weight, in [-1, 0]: the authors' -0.5 for convolutions, -0.8 for transformers.
        growth: factor of ``beta`` a step, in (0, 1].

    Raises:
        ValueError: for an option outside its range, naming it.
        RuntimeError: from ``step``, for a sparse gradient or complex parameters.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, beta: float | None = 0.9, eps: float = 1e-8,
        weight_decay: float = 0.0, *, decay: float = -0.5, growth: float = 0.999,
    ) -> None:  # fmt: skip
        if beta is not None and not 0 <= beta < 1:
            raise ValueError(f"SMMF(beta={beta!r}): the old momentum's weight must lie in [0, 1), or None for no momentum")
        if not -1 <= decay <= 0:
            raise ValueError(f"SMMF(decay={decay!r}): an exponent of the step in [-1, 0], e.g. -0.5")
        if not 0 < growth <= 1:
            raise ValueError(f"SMMF(growth={growth!r}): a factor in (0, 1], e.g. 0.999")
        super().__init__(params, lr, weight_decay, beta=beta, eps=eps, decay=decay, growth=growth)

    def fresh_state(self, group: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        rows, columns = _sides(p.numel())
        zeros = lambda *sizes, dtype=dtype: torch.zeros(sizes, dtype=dtype, device=p.device)
        state = {"square_rows": zeros(rows), "square_columns": zeros(columns)}
        if group["beta"] is not None:
            signs = zeros(-(-rows // 8), columns, dtype=torch.uint8)
            state |= {"average_rows": zeros(rows), "average_columns": zeros(columns), "signs": signs}
        return state

    def direction(self, group: dict[str, Any], grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        count = state["step"]
        rows, columns = _sides(grad.numel())
        matrix = grad.reshape(rows, columns)
        weight = 1 - count ** group["decay"]
        square = weight * torch.outer(state["square_rows"], state["square_columns"]) + (1 - weight) * matrix**2
        _compress(square, state["square_rows"], state["square_columns"])
        average = matrix
        if group["beta"] is not None:
            weight = group["beta"] * group["growth"] ** (count - 1)
            sizes = torch.outer(state["average_rows"], state["average_columns"])
            average = weight * torch.where(_unpacked(state["signs"], rows), sizes, -sizes) + (1 - weight) * matrix
            _compress(average.abs(), state["average_rows"], state["average_columns"])
            state["signs"].copy_(_packed(average > 0))
        return (average / (square.sqrt() + group["eps"])).reshape(grad.shape)


def _sides(size: int) -> tuple[int, int]:
    """Rows and columns of the squarest matrix of ``size`` elements."""
    columns = _largest_divisor(size, math.isqrt(size))
    return size // columns, columns


def _largest_divisor(size: int, most: int) -> int:
    """Up to ``most``; 1 for an empty tensor."""
    return next((divisor for divisor in range(most, 1, -1) if size % divisor == 0), 1)


def _compress(matrix: Tensor, rows: Tensor, columns: Tensor) -> None:
    """The outer product with the row and column sums of a matrix >= 0, written in place."""
    rows.copy_(matrix.sum(1))
    whole = rows.sum()
    # in blocks of rows that stay in a cache while a compiled loop goes down its columns
    block = _largest_divisor(len(matrix), min(32, len(matrix)))
    sums = matrix.reshape(-1, block, matrix.shape[1]).sum(1).sum(0)
    columns.copy_(sums / torch.where(whole > 0, whole, torch.ones_like(whole)))


def _packed(flags: Tensor) -> Tensor:
    """``[rows, columns]`` -> one bit a flag, uint8 ``[ceil(rows / 8), columns]``. The bits of a byte are of one column, so
    that neighbours in memory stay neighbours and a compiled loop takes many at a time."""
    padded = torch.nn.functional.pad(flags.to(torch.int32), (0, 0, 0, -flags.shape[0] % 8))
    planes = padded.reshape(8, -1, flags.shape[1])
    return (planes << _places(flags)).sum(0, dtype=torch.int32).to(torch.uint8)


def _unpacked(bits: Tensor, rows: int) -> Tensor:
    flags = (bits.to(torch.int32) >> _places(bits)) & 1
    return flags.reshape(-1, bits.shape[1])[:rows].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.int32, device=like.device)[:, None, None]
