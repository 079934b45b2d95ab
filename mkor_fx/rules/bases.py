"""Factors of one matrix by side, ``L`` ``[O, O]`` and ``R`` ``[I, I]``, and their bases ``L_basis`` and ``R_basis``; a side
without one is the identity."""

from __future__ import annotations

from torch import Tensor

from ..prims import precondition
from .base import State


def grams(state: State, grad_OI: Tensor) -> dict[str, Tensor]:
    """``G G^T`` and ``G^T G`` of the sides that a state has a factor of."""
    return {name: matrix @ matrix.mT for name, matrix in (("L", grad_OI), ("R", grad_OI.mT)) if name in state}


def into_bases(state: State, matrix_OI: Tensor) -> Tensor:
    """``Q_L^T M Q_R``, in the dtype of the matrix."""
    Q_L, Q_R = state.get("L_basis"), state.get("R_basis")
    return precondition(None if Q_L is None else Q_L.mT, matrix_OI, Q_R)


def out_of_bases(state: State, matrix_OI: Tensor) -> Tensor:
    """``Q_L M Q_R^T``, in the dtype of the matrix."""
    Q_L, Q_R = state.get("L_basis"), state.get("R_basis")
    return precondition(Q_L, matrix_OI, None if Q_R is None else Q_R.mT)
