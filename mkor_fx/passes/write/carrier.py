"""What a carrier holds: the geometry of the leaf whose gradient takes statistics out of a backward graph.

Its rows are the statistics vectors of both orientations, padded to one length; where directions are made in the backward,
a third row holds what sizes them in the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir import INPUTS_FIRST, INPUTS_LAST
from ...prims import accumulation_dtype
from ..match.layout import Layout

#: squared norms that a third row holds of each matrix: of gradient and direction, of weight and bias
NORMS = 4


@dataclass(frozen=True)
class Carrier:
    """``[2, size]`` or, with ``norms``, ``[3, size]``, in ``dtype``."""

    size: int
    dtype: torch.dtype
    norms: bool = False

    @classmethod
    def of(cls, layout: Layout, dtype: torch.dtype, norms: bool) -> Carrier:
        """The carrier of a weight of ``dtype``. Graphs that use it in other orientations have the same."""
        size = layout.statistics_size
        return cls(max(NORMS * (layout.members or 1), size) if norms else size, accumulation_dtype(dtype), norms)

    @property
    def shape(self) -> tuple[int, int]:
        return (3 if self.norms else 2, self.size)

    def pack(self, vectors: Mapping[int, Tensor], norms: Tensor | None = None) -> Tensor:
        """Statistics by orientation, and the norms, as rows; a missing one is zero."""
        rows = [vectors.get(kind) for kind in (INPUTS_LAST, INPUTS_FIRST)] + ([norms] if self.norms else [])
        like = next(row for row in rows if row is not None)
        padded = [like.new_zeros(self.size) if r is None else self._padded(r) for r in rows]
        return torch.stack([row.to(self.dtype) for row in padded])

    def _padded(self, row: Tensor) -> Tensor:
        return torch.nn.functional.pad(row, (0, self.size - row.numel()))

    @staticmethod
    def vectors(carrier: Tensor, kinds: Iterable[int]) -> dict[int, Tensor]:
        """The statistics vectors of the orientations ``kinds``."""
        return {kind: carrier[kind] for kind in kinds}

    @staticmethod
    def squared_norms(carrier: Tensor, members: tuple[int, ...]) -> Tensor:
        """``[*members, 4]``: of gradient and direction of the weight, then of the bias."""
        count = NORMS * (members[0] if members else 1)
        return carrier[2, :count].reshape([*members, NORMS])
