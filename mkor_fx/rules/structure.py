"""What a structure of matrices is that products keep: numbers of its own, multiplied without being written out.

Shape suffixes: ``N`` rows, ``D`` the side of a matrix, ``S`` its numbers; a matrix ``K`` is what ``identity`` and the other
functions return, in the structure's own shape. Its numbers are entries of the matrix, so sums and multiples are those of the
numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prims import accumulation_dtype


@dataclass(frozen=True)
class Structure(ABC):
    """Matrices ``[D, D]`` of one structure. ``P`` projects a symmetric matrix onto it (Lin et al., 2312.05705, Table 1)."""

    size: int
    #: whether ``P(K^T R K)`` depends on more of ``R`` than ``P(R)``
    needs_rows = False

    @abstractmethod
    def identity(self, device: torch.device) -> Tensor:
        """The identity, float32."""

    @abstractmethod
    def gram(self, rows_ND: Tensor) -> Tensor:
        """``P(rows^T rows)``, accumulated in float32 (float64 for float64 rows)."""

    @abstractmethod
    def times(self, rows_ND: Tensor, K: Tensor, transposed: bool = False) -> Tensor:
        """``rows K``, or ``rows K^T``, ``[N, D]``."""

    @abstractmethod
    def product(self, K: Tensor, M: Tensor) -> Tensor:
        """``K M``"""

    @abstractmethod
    def square(self, K: Tensor) -> Tensor:
        """``P(K^T K)``"""

    def congruence(self, K: Tensor, moment: Tensor) -> Tensor:
        """``P(K^T R K)`` for a ``moment = P(R)``; where it ``needs_rows``, of the moment of ``rows K`` itself."""
        return moment

    def mean_of_diagonal(self, K: Tensor) -> Tensor:
        """``tr K / D``, 0-dim"""
        return (K * self.identity(K.device).to(K.dtype)).sum() / self.size

    def bound(self, K: Tensor) -> Tensor:
        """Largest sum of the absolute values of a row, 0-dim: no eigenvalue exceeds it."""
        return self.times(K.new_ones(1, self.size), K.abs(), transposed=True).amax()

    def matrix(self, K: Tensor) -> Tensor:
        """``K`` written out, ``[D, D]``"""
        return self.times(torch.eye(self.size, dtype=K.dtype, device=K.device), K)


def gram_of(rows_ND: Tensor) -> Tensor:
    """``rows^T rows``, accumulated in float32 (float64 for float64 rows)."""
    wide = rows_ND.to(accumulation_dtype(rows_ND.dtype))
    return wide.mT @ wide
