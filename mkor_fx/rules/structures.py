"""The structures that there are. Shape suffixes: ``N`` rows, ``D`` the side of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..prims import accumulation_dtype, column_square_sum
from .structure import Structure, gram_of

Named = Literal["dense", "diagonal", "block", "triangular", "rank1", "hierarchical"]
NAMES = ("dense", "diagonal", "block", "triangular", "rank1", "hierarchical")


def structure_of(name: str, size: int, block: int, corners: tuple[int, int]) -> Structure:
    """The structure called ``name`` of a side of ``size``."""
    if name == "block":
        return Blocks(size, min(block, size))
    if name in ("rank1", "hierarchical"):
        return Hierarchical(size, *((0, 1) if name == "rank1" else corners))
    simple: dict[str, type[Structure]] = {"dense": Dense, "diagonal": Diagonal, "triangular": Triangular}
    return simple[name](size)


class Dense(Structure):
    """Every matrix: ``D^2`` numbers, ``P(M) = M``."""

    def identity(self, device: torch.device) -> Tensor:
        return torch.eye(self.size, device=device)

    def gram(self, rows_ND: Tensor) -> Tensor:
        return gram_of(rows_ND)

    def times(self, rows_ND: Tensor, K: Tensor, transposed: bool = False) -> Tensor:
        return rows_ND @ (K.mT if transposed else K)

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        return K @ M

    def square(self, K: Tensor) -> Tensor:
        return K.mT @ K

    def congruence(self, K: Tensor, moment: Tensor) -> Tensor:
        return K.mT @ moment @ K


class Diagonal(Structure):
    """``D`` numbers, ``P(M)`` is the diagonal."""

    def identity(self, device: torch.device) -> Tensor:
        return torch.ones(self.size, device=device)

    def gram(self, rows_ND: Tensor) -> Tensor:
        return column_square_sum(rows_ND)

    def times(self, rows_ND: Tensor, K: Tensor, transposed: bool = False) -> Tensor:
        return rows_ND * K

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        return K * M

    def square(self, K: Tensor) -> Tensor:
        return K * K

    def congruence(self, K: Tensor, moment: Tensor) -> Tensor:
        return K * moment * K


@dataclass(frozen=True)
class Blocks(Dense):
    """Diagonal blocks of ``block``, the last one smaller: ``D block`` numbers at most, with zeros behind the last block.
    ``P(M)`` are the blocks of ``M``."""

    block: int

    def identity(self, device: torch.device) -> Tensor:
        inside = torch.arange(self._count * self.block, device=device) < self.size
        return torch.diag_embed(inside.reshape(self._count, self.block).to(torch.float32))

    @property
    def _count(self) -> int:
        return -(-self.size // self.block)

    def _split(self, rows_ND: Tensor) -> Tensor:
        """``[blocks, N, block]``"""
        padded = pad(rows_ND, (0, -self.size % self.block))
        return padded.reshape(rows_ND.shape[0], self._count, self.block).transpose(0, 1)

    def gram(self, rows_ND: Tensor) -> Tensor:
        return gram_of(self._split(rows_ND))

    def times(self, rows_ND: Tensor, K: Tensor, transposed: bool = False) -> Tensor:
        made = self._split(rows_ND) @ (K.mT if transposed else K)
        return made.transpose(0, 1).reshape(rows_ND.shape[0], self._count * self.block)[:, : self.size]


class Triangular(Structure):
    """Lower triangular, row by row: ``D (D + 1) / 2`` numbers. ``P(M)`` is the lower half with what is below the diagonal
    doubled."""

    def identity(self, device: torch.device) -> Tensor:
        return self._packed(torch.eye(self.size, device=device))

    def _packed(self, matrix_DD: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(self.size, self.size, device=matrix_DD.device)
        return matrix_DD.flatten()[rows * self.size + columns]

    def _opened(self, K: Tensor) -> Tensor:
        place = torch.arange(self.size, device=K.device)
        rows, columns = place[:, None], place[None, :]
        at = rows * (rows + 1) // 2 + torch.minimum(columns, rows)
        return torch.where(columns <= rows, K[at.flatten()].reshape(self.size, self.size), 0)

    def _projected(self, symmetric_DD: Tensor) -> Tensor:
        return self._packed(2 * symmetric_DD - torch.diag_embed(symmetric_DD.diagonal()))

    def gram(self, rows_ND: Tensor) -> Tensor:
        return self._projected(gram_of(rows_ND))

    def times(self, rows_ND: Tensor, K: Tensor, transposed: bool = False) -> Tensor:
        opened = self._opened(K)
        return rows_ND @ (opened.mT if transposed else opened)

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        return self._packed(self._opened(K) @ self._opened(M))

    def square(self, K: Tensor) -> Tensor:
        return self.gram(self._opened(K))

    def congruence(self, K: Tensor, moment: Tensor) -> Tensor:
        opened, half = self._opened(K), self._opened(moment)
        return self._projected(opened.mT @ (half + half.mT) @ opened / 2)


@dataclass(frozen=True)
class Hierarchical(Structure):
    """``[[A, B, B'], [0, C, 0], [0, F, E]]`` with ``A`` of ``first`` rows, ``E`` of ``last`` and a diagonal ``C``:
    ``D (first + last + 1)`` numbers at most. ``P(M)`` are the entries of ``M`` in these places, those of ``B``, ``B'`` and
    ``F`` doubled. Without ``first`` and with one row at the end it is the triangle of rank one, ``2 D - 1`` numbers, whose
    ``(K K^T)^-1`` is a diagonal matrix plus one of rank one."""

    first: int
    last: int
    needs_rows = True

    @property
    def _cuts(self) -> tuple[int, int]:
        """``first`` and ``last`` of a matrix that may be too small for them."""
        first = min(self.first, self.size)
        return first, min(self.last, self.size - first)

    def identity(self, device: torch.device) -> Tensor:
        first, last = self._cuts
        eye = lambda rows, columns: torch.eye(rows, columns, device=device)
        middle = self.size - first - last
        return torch.cat([eye(first, self.size).flatten(), torch.ones(middle, device=device),
                          pad(eye(last, last), (middle, 0)).flatten()])  # fmt: skip

    def _parts(self, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first rows ``[first, D]``, the diagonal between them and the last rows ``[last, D]``."""
        first, last = self._cuts
        upper, middle, lower = K.split([first * self.size, self.size - first - last, last * (self.size - first)])
        return upper.reshape(first, self.size), middle, pad(lower.reshape(last, self.size - first), (first, 0))

    def _joined(self, upper: Tensor, middle: Tensor, lower: Tensor) -> Tensor:
        return torch.cat([upper.flatten(), middle, lower[:, self._cuts[0] :].flatten()])

    def gram(self, rows_ND: Tensor) -> Tensor:
        first, last = self._cuts
        wide = rows_ND.to(accumulation_dtype(rows_ND.dtype))
        ends = self.size - last
        upper, lower = wide[:, :first].mT @ wide, wide[:, ends:].mT @ wide
        upper = torch.cat([upper[:, :first], 2 * upper[:, first:]], 1)
        lower = torch.cat([2 * lower[:, :ends], lower[:, ends:]], 1)
        return self._joined(upper, column_square_sum(rows_ND[:, first:ends]), lower)

    def times(self, rows_ND: Tensor, K: Tensor, transposed: bool = False) -> Tensor:
        first, last = self._cuts
        upper, middle, lower = self._parts(K)
        scaled = rows_ND[:, first : self.size - last] * middle
        if transposed:
            return torch.cat([rows_ND @ upper.mT, scaled, rows_ND @ lower.mT], 1)
        return rows_ND[:, :first] @ upper + pad(scaled, (first, last)) + rows_ND[:, self.size - last :] @ lower

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        upper, middle, lower = self._parts(K)
        return self._joined(self.times(upper, M), middle * self._parts(M)[1], self.times(lower, M))

    def square(self, K: Tensor) -> Tensor:
        upper, middle, lower = self._parts(K)
        of_rows = self.gram(torch.cat([upper, lower]))
        return of_rows + self._joined(torch.zeros_like(upper), middle * middle, torch.zeros_like(lower))
