"""K-FAC: averaged Kronecker factors, inverted outside of the step (Martens & Grosse, 1503.05671; KAISA, 2107.01739)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype
from .base import Rule, Shape, State, Use
from .direction import Gradient, Graft, Sides
from .hyper import Hyper, number


@dataclass(frozen=True, kw_only=True)
class KFAC(Rule):
    """Kronecker-factored curvature with damped inverses.

    With rows ``a`` of inputs and ``g`` of output gradients, ``N`` of them, the factors are averages of
    ``R = a^T a / N`` and ``L = N g^T g`` (``g`` carries ``1/N``), each averaged as ``F <- decay F + (1 - decay) F_new`` with
    the first statistic taken as it is. Every ``derive_every`` steps they are inverted with factored damping
    ``pi = sqrt((tr R / I) / (tr L / O))``:

        ``D = (L + sqrt(damping) / pi)^-1 G (R + pi sqrt(damping))^-1``

    A step uses the inverses of an earlier one; until the first are made, the gradient itself. What crosses the network is
    ``I^2 + O^2`` numbers a layer. An embedding's vocabulary, and a side above ``max_factor``, stays the identity.

    Args:
        damping: added to the curvature, split over both factors, > 0.
        decay: weight of the old average, in [0, 1).
        derive_every: steps between two inversions, which are eager ``torch.linalg`` calls and may wait for the device.
        graft: what sizes a direction; ``"gradient"`` stands in for K-FAC's clip of the KL divergence, layer by layer.
        max_factor: a side larger than this stays the identity.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    damping: Hyper = 1e-3
    decay: Hyper = 0.95
    derive_every: int = 10
    graft: Graft | None = "gradient"
    max_factor: int = 4096

    without_state = "both sides exceed max_factor"
    kinds = {  # noqa: RUF012
        "L": Kind.POSITIVE,
        "R": Kind.POSITIVE,
        "L_inverse": Kind.POSITIVE,
        "R_inverse": Kind.POSITIVE,
    }

    def __post_init__(self) -> None:
        if not number(self.damping, "KFAC(damping=") > 0:
            raise ValueError(f"KFAC(damping={self.damping!r}): must be positive, e.g. 1e-3")
        if not 0 <= number(self.decay, "KFAC(decay=") < 1:
            raise ValueError(f"KFAC(decay={self.decay!r}): the weight of the old average must lie in [0, 1), e.g. 0.95")
        if not isinstance(self.max_factor, int) or self.max_factor < 0:
            raise ValueError(f"KFAC(max_factor={self.max_factor!r}): must be an integer, 0 (no factors) or more")

    def init(self, shape: Shape, device: torch.device) -> State:
        """``L`` and ``R`` zero, their inverses the identity, float32; ``seen`` counts refreshes."""
        sides = {"L": shape.O} if shape.lookup else {"L": shape.O, "R": shape.I}
        sides = {name: size for name, size in sides.items() if size <= self.max_factor}
        state = {name: torch.zeros(size, size, device=device) for name, size in sides.items()}
        state |= {f"{name}_inverse": torch.eye(size, device=device) for name, size in sides.items()}
        return {**state, "seen": torch.zeros((), device=device)} if state else {}

    def preconditions_bias(self, shape: Shape) -> bool:
        return shape.O <= self.max_factor

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        """``a^T a`` and ``g^T g``, accumulated in float32; nothing of a side without a factor."""
        kept = (None if shape.lookup or shape.I > self.max_factor else a_NI, None if shape.O > self.max_factor else g_NO)
        return tuple(g_NO.new_zeros(0, dtype=torch.float32) if rows is None else _gram(rows) for rows in kept)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = summary
        return inputs, outputs / (scale * scale)

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        new: dict[str, Tensor] = {}
        for use in uses:
            inputs, outputs = use.summary
            rows = use.rows.clamp_min(1)
            a_II, g_OO = inputs / rows, outputs * rows
            for name, moment in (("L", a_II if use.opposite else g_OO), ("R", g_OO if use.opposite else a_II)):
                new[name] = new[name] + moment if name in new else moment
        old = torch.where(state["seen"] > 0, torch.ones_like(state["seen"]) * self.decay, torch.zeros_like(state["seen"]))
        averaged: dict[str, Tensor] = {
            name: old * state[name] + (1 - old) * new[name].to(state[name].dtype) / len(uses)
            for name in ("L", "R")
            if name in state
        }
        return {**state, **averaged, "seen": state["seen"] + 1}

    def derive(self, state: State) -> State:
        """The damped inverses, by Cholesky, of factors that have seen a refresh."""
        factors = {name: state[name] for name in ("L", "R") if name in state}
        means = {name: factor.diagonal(dim1=-2, dim2=-1).mean(-1) for name, factor in factors.items()}
        pi = (means["R"] / means["L"]).sqrt() if len(means) == 2 else torch.ones_like(state["seen"])
        pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))
        root = torch.as_tensor(self.damping, dtype=pi.dtype, device=pi.device).sqrt()
        derived = {}
        for name, factor in factors.items():
            damping = root / pi if name == "L" else root * pi
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(factor + damping[..., None, None] * eye))
            derived[f"{name}_inverse"] = torch.where(state["seen"] > 0, inverse, state[f"{name}_inverse"])
        return {**state, **derived}

    def sides(self, state: State) -> Sides:
        return Sides(state.get("L_inverse"), state.get("R_inverse"))


def _gram(rows_NM: Tensor) -> Tensor:
    wide = rows_NM.to(accumulation_dtype(rows_NM.dtype))
    return wide.mT @ wide
