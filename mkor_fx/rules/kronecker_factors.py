"""Averaged Kronecker factors ``L`` ``[O, O]`` and ``R`` ``[I, I]`` of one weight: statistics, averages, damping.

With rows ``a`` of inputs and ``g`` of output gradients (which carry ``1/N``): ``R = a^T a / N`` and ``L = N g^T g``. Shape
suffixes: ``N`` rows, ``M`` any width, ``O`` outputs, ``I`` inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..prims import accumulation_dtype
from .base import Rule, Shape, State, Use
from .hyper import weight_of_old


def check_max_factor(rule: Any) -> None:
    """Raises ValueError for a ``max_factor`` that is no size."""
    if not isinstance(rule.max_factor, int) or rule.max_factor < 0:
        name = type(rule).__name__
        raise ValueError(f"{name}(max_factor={rule.max_factor!r}): must be an integer, 0 (no factors) or more")


def sides_with_factor(shape: Shape, max_factor: int) -> dict[str, int]:
    """Sizes of the factors by name: an embedding's vocabulary, and a side above ``max_factor``, has none."""
    sides = {"L": shape.O} if shape.lookup else {"L": shape.O, "R": shape.I}
    return {name: size for name, size in sides.items() if size <= max_factor}


class FactoredRule(Rule):
    """A rule over such factors, of sides up to ``max_factor``: what each use contributes to them."""

    max_factor: int

    def without_state(self, shape: Shape) -> str:
        return f"both sides exceed max_factor={self.max_factor}"

    def preconditions_bias(self, shape: Shape) -> bool:
        return shape.O <= self.max_factor

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        """``a^T a`` and ``g^T g``, accumulated in float32; nothing of a side without a factor."""
        most = self.max_factor
        kept = None if shape.lookup or shape.I > most else a_NI, None if shape.O > most else g_NO
        return tuple(g_NO.new_zeros(0, dtype=torch.float32) if rows is None else _gram(rows) for rows in kept)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = summary
        return inputs, outputs / (scale * scale)


def moments(state: State, uses: list[Use]) -> dict[str, Tensor]:
    """``L`` and ``R`` of this step's rows, where the state has such a factor."""
    new: dict[str, Tensor] = {}
    for use in uses:
        inputs, outputs = use.summary[:2]
        rows = use.rows.clamp_min(1)
        a_II, g_OO = inputs / rows, outputs * rows
        for name, moment in (("L", a_II if use.opposite else g_OO), ("R", g_OO if use.opposite else a_II)):
            new[name] = new[name] + moment if name in new else moment
    return {name: new[name].to(state[name].dtype) / len(uses) for name in ("L", "R") if name in state}


def averaged(state: State, uses: list[Use], decay: Any) -> State:
    """The state with ``F <- decay F + (1 - decay) F_new`` for its factors, the first as it is, and ``seen`` one on."""
    old = weight_of_old(state["seen"], decay)
    factors = {name: old * state[name] + (1 - old) * new for name, new in moments(state, uses).items()}
    return {**state, **factors, "seen": state["seen"] + 1}


def damped(state: State, damping: Any, pi: bool) -> dict[str, Tensor]:
    """The factors with ``damping`` on each; ``pi``: with ``sqrt(damping)`` shared out by their mean eigenvalues, as
    ``L + sqrt(damping) / pi`` and ``R + pi sqrt(damping)`` with ``pi = sqrt((tr R / I) / (tr L / O))``."""
    factors = {name: state[name] for name in ("L", "R") if name in state}
    means = {name: factor.diagonal(dim1=-2, dim2=-1).mean(-1) for name, factor in factors.items()}
    share = torch.ones_like(next(iter(means.values())))
    damping = (share * damping).to(share.dtype)
    if pi:
        damping = damping.sqrt()
        share = (means["R"] / means["L"]).sqrt() if len(means) == 2 else share
        share = torch.where(torch.isfinite(share) & (share > 0), share, torch.ones_like(share))
    added = {"L": damping / share, "R": damping * share}
    eyes = {name: torch.eye(f.shape[-1], dtype=f.dtype, device=f.device) for name, f in factors.items()}
    return {name: factor + added[name][..., None, None] * eyes[name] for name, factor in factors.items()}


def _gram(rows_NM: Tensor) -> Tensor:
    wide = rows_NM.to(accumulation_dtype(rows_NM.dtype))
    return wide.mT @ wide
