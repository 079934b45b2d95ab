"""MKOR: rank-1 updates of inverse Kronecker factors (Mozaffari et al., NeurIPS 2023, arXiv 2306.01685, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import (
    accumulation_dtype,
    column_square_sum,
    column_sum,
    inverse_update,
    inverse_update_by,
    rademacher,
    scale_to,
    scale_to_by,
    unless_noise,
)
from .base import Rule, Shape, State, Use
from .direction import Gradient, Sides, joined
from .hyper import Hyper, number

FORMS = ("scale_free", "forgetful", "exact", "paper")
STATISTICS = ("mean", "gradient", "mean+gradient")
BIASES = ("left", "joint", "off")
#: a sum shorter than this many times its expected rounding counts as zero
NOISE = 32.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class MKOR(Rule):
    """Momentum-enabled Kronecker-factor optimizer with rank-1 updates.

    For a weight ``W`` of ``[O, I]`` with statistics ``g_O = sum_n g[n]`` and ``a_I = mean_n a[n]`` the inverse factors
    ``L`` of ``[O, O]`` and ``R`` of ``[I, I]`` take one rank-1 step each, and the base optimizer gets
    ``L @ grad @ R * |grad| / |L @ grad @ R|``.

    Fields of type ``Hyper`` may change over time: a number, a 0-dim tensor, or a function of the step.

    Args:
        form: how an inverse factor ``F`` takes a statistic ``v``. With ``k`` statistics a side each has weight ``1/k``.

            - ``"scale_free"`` (default): ``forgetful`` on ``v * sqrt(kappa) / |v|``. Keeps
              ``(1-gamma) / (1 + kappa (1-gamma)) <= F <= 1`` whatever the scale of loss, activations or loss scaler.
            - ``"forgetful"``: ``B = gamma F + (1-gamma) I``, then ``B - B v (B v)^T / (1 + v^T B v)``: what the
              released code computes.
            - ``"exact"``: the inverse of ``gamma L + (1-gamma) v v^T``. Unseen directions grow as ``gamma^-t``, so it
              needs the stabiliser.
            - ``"paper"``: ``gamma F + (1-gamma) / (gamma^2 (1 + gamma (1-gamma) v^T F v)) F v (F v)^T``, as printed. It
              amplifies the direction it has seen; offered for comparison.
        statistic: ``"mean"`` as above; ``"gradient"``: the random-sign sketches ``G w`` and ``G^T w'`` of the gradient,
            unbiased for ``G G^T`` and ``G^T G``, which need no capture; ``"mean+gradient"``: both.
        gamma: factor momentum, in (0, 1).
        kappa: squared length to which ``scale_free`` brings every statistic, > 0.
        epsilon, zeta: norm-based stabiliser: where ``max |F| > epsilon``, ``F <- zeta F + (1 - zeta) I`` before the
            update. ``zeta < gamma``; None is ``gamma / 2``. ``epsilon=None`` is 1000 for ``exact`` and ``paper`` and
            infinite (off) for the other two, which are bounded by 1 by construction.
        rescale: give each direction the norm of its raw gradient.
        bias: ``"left"``: ``L @ grad`` with its own norms; ``"joint"``: one more column of ``[W | b]``; ``"off"``: raw.
        clamp: bound on the entries of every row of ``a`` and ``g`` before they are summed, or None.
        max_factor: a side larger than this stays the identity.
        factor_dtype: float32, bfloat16, float16 or float64. The arithmetic of the update is float32 (float64 for
            float64 factors); the two products run in the dtype of the gradient.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    form: Literal["scale_free", "forgetful", "exact", "paper"] = "scale_free"
    statistic: Literal["mean", "gradient", "mean+gradient"] = "mean"
    gamma: Hyper = 0.99
    kappa: Hyper = 10.0
    epsilon: Hyper | None = None
    zeta: Hyper | None = None
    rescale: bool = True
    bias: Literal["left", "joint", "off"] = "left"
    clamp: Hyper | None = None
    max_factor: int = 4096
    factor_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        choices = (("form", FORMS), ("statistic", STATISTICS), ("bias", BIASES), ("factor_dtype", DTYPES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"MKOR({name}={getattr(self, name)!r}): must be one of {', '.join(map(str, allowed))}")
        given = {name: getattr(self, name) for name in ("gamma", "kappa", "epsilon", "zeta", "clamp")}
        first = {name: number(value, f"MKOR({name}=") for name, value in given.items() if value is not None}
        gamma, zeta = first.get("gamma", math.nan), first.get("zeta")
        if not 0 < gamma < 1:
            raise ValueError(f"MKOR(gamma={self.gamma!r}): the factor momentum must lie inside (0, 1), e.g. 0.99")
        if zeta is not None and not 0 <= zeta < gamma:
            raise ValueError(
                f"MKOR(zeta={self.zeta!r}): the stabiliser needs 0 <= zeta < gamma={self.gamma}, "
                "or it cannot outrun the growth of unseen directions; lower zeta or raise gamma"
            )
        for name in ("kappa", "epsilon", "clamp"):
            if name in first and not first[name] > 0:
                raise ValueError(f"MKOR({name}={given[name]!r}): must be positive")
        if self.kappa is None or math.isinf(first["kappa"]):
            raise ValueError(f"MKOR(kappa={self.kappa!r}): must be a positive, finite number, e.g. 10.0")
        if not isinstance(self.max_factor, int) or self.max_factor < 0:
            raise ValueError(f"MKOR(max_factor={self.max_factor!r}): must be an integer, 0 (no factors) or more")

    @property
    def reads_gradient(self) -> bool:  # type: ignore[override]
        return "gradient" in self.statistic

    @property
    def graft(self) -> Literal["gradient"] | None:  # type: ignore[override]
        return "gradient" if self.rescale else None

    @property
    def joint_bias(self) -> bool:  # type: ignore[override]
        return self.bias == "joint"

    @property
    def stabiliser_threshold(self) -> Any:
        if self.epsilon is not None:
            return self.epsilon
        return 1000.0 if self.form in ("exact", "paper") else math.inf

    @property
    def pull(self) -> Any:
        """``zeta``, or what None stands for."""
        return self.gamma / 2 if self.zeta is None else self.zeta

    without_state = "both sides exceed max_factor"
    kinds = {"L": Kind.POSITIVE, "R": Kind.POSITIVE}  # noqa: RUF012

    def init(self, shape: Shape, device: torch.device) -> State:
        """``{"L": eye(O), "R": eye(I)}`` in ``factor_dtype``, sides above ``max_factor`` left out.

        The vocabulary of an embedding is a side that is left out, too: the second moment of one-hots is diagonal, which
        base optimizers with a scale an element take care of, while a full factor would move rows that no token has used.
        """
        inputs = shape.I + (shape.bias and self.bias == "joint")
        sides = {"L": shape.O} if shape.lookup else {"L": shape.O, "R": inputs}
        return {
            name: torch.eye(size, dtype=self.factor_dtype, device=device)
            for name, size in sides.items()
            if size <= self.max_factor
        }

    def preconditions_bias(self, shape: Shape) -> bool:
        return self.bias == "joint" or (self.bias == "left" and shape.O <= self.max_factor)

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        """``sum_n a[n]``, ``sum_n g[n]`` and how large either is by rounding alone: ``I + O + 3`` numbers with the rows,
        nothing of a side that has no factor.

        Some sums are zero in exact arithmetic: of ``g`` in front of a batch norm or in an attention's keys, of ``a``
        behind centred data. ``scale_free`` would blow their rounding up to full size, so it needs to know. Each entry
        is rounded by ``eps`` of its dtype, so a sum is noise below about ``eps * sqrt(sum_n |row|^2)``.
        """
        if self.statistic == "gradient":
            return ()
        if self.clamp is not None:
            a_NI, g_NO = a_NI.clamp(-self.clamp, self.clamp), g_NO.clamp(-self.clamp, self.clamp)
        kept = (
            None if shape.lookup or shape.I > self.max_factor else a_NI,
            None if shape.O > self.max_factor else g_NO,
        )
        sums = tuple(torch.zeros(0, device=g_NO.device) if rows is None else column_sum(rows) for rows in kept)
        if self.form != "scale_free":
            return sums
        return *sums, *(torch.zeros((), device=g_NO.device) if rows is None else _rounding(rows) for rows in kept)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        """``g`` is linear in the scale, its rounding quadratic, the inputs do not depend on it."""
        one = torch.ones_like(scale)
        return tuple(s / factor for s, factor in zip(summary, (one, scale, one, scale * scale)))

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        left, right = [], []
        dtype = accumulation_dtype(self.factor_dtype)
        joint = grad.bias is not None and self.bias == "joint"
        if self.statistic != "gradient":
            for use in uses:
                a_sum, g_O = use.summary[:2]
                if self.form == "scale_free":
                    a_sum, g_O = unless_noise(a_sum, use.summary[2]), unless_noise(g_O, use.summary[3])
                a_I = a_sum / use.rows.clamp_min(1)
                along_O, along_I = (a_I, g_O) if use.opposite else (g_O, a_I)
                if joint:  # the bias is a column whose input is always 1, and which the opposite use does not have
                    along_I = torch.cat([along_I, along_I.new_full((1,), 0.0 if use.opposite else 1.0)])
                left.append(along_O)
                right.append(along_I)
        if self.reads_gradient:
            grad_OI = (joined(grad) if joint else grad.weight).to(dtype)
            signs_I = rademacher(step, 0, grad_OI.shape[1], dtype)
            signs_O = rademacher(step, 1, grad_OI.shape[0], dtype)
            sketches = (grad_OI * signs_I).sum(1), (grad_OI * signs_O[:, None]).sum(0)
            if self.form == "scale_free":
                noise = (grad_OI * grad_OI).sum() * (NOISE * torch.finfo(grad.weight.dtype).eps) ** 2
                sketches = unless_noise(sketches[0], noise), unless_noise(sketches[1], noise)
            left.append(sketches[0])
            right.append(sketches[1])
        vectors = {"L": [v.to(dtype) for v in left], "R": [v.to(dtype) for v in right]}
        return {name: self._refresh(factor, vectors[name]) for name, factor in state.items()}

    def _refresh(self, factor_DD: Tensor, vectors: list[Tensor]) -> Tensor:
        share = 1 / len(vectors)
        factor = self._stabilise(factor_DD, vectors[0].dtype)
        if self.form == "scale_free":
            scale_by = scale_to_by if isinstance(self.kappa, Tensor) else scale_to
            vectors = [scale_by(v, self.kappa) for v in vectors]
        if self.form == "paper":
            return self._as_printed(factor, vectors).to(factor_DD.dtype)
        if self.form == "exact":
            scale, shift, weight = 1 / self.gamma, 0.0, (1 - self.gamma) * share
        else:
            scale, shift, weight = self.gamma, 1 - self.gamma, share
        if isinstance(self.gamma, Tensor):
            numbers = [x if isinstance(x, Tensor) else self.gamma.new_full((), x) for x in (scale, shift, weight)]
            return inverse_update_by(factor, vectors, *numbers).to(factor_DD.dtype)
        return inverse_update(factor, vectors, scale, shift, weight).to(factor_DD.dtype)

    def _as_printed(self, factor_DD: Tensor, vectors: list[Tensor]) -> Tensor:
        weight = (1 - self.gamma) / len(vectors)
        factor = factor_DD.to(vectors[0].dtype)
        updated = self.gamma * factor
        for v_D in vectors:
            u_D = (factor * v_D).sum(1)
            coefficient = weight / (self.gamma**2 * (1 + self.gamma * weight * (v_D * u_D).sum()))
            updated = updated + torch.outer(coefficient * u_D, u_D)
        return updated

    def _stabilise(self, factor_DD: Tensor, dtype: torch.dtype) -> Tensor:
        """A positive definite matrix has its largest entry on the diagonal, so ``max |F|`` costs ``D`` reads."""
        threshold = self.stabiliser_threshold
        if not isinstance(threshold, Tensor) and math.isinf(threshold):
            return factor_DD
        factor = factor_DD.to(dtype)
        fires = factor.diagonal().abs().amax() > threshold
        identity = torch.eye(factor.shape[0], dtype=dtype, device=factor.device)
        return torch.where(fires, self.pull * factor + (1 - self.pull) * identity, factor)

    def sides(self, state: State) -> Sides:
        return Sides(state.get("L"), state.get("R"))


def _rounding(rows_NM: Tensor) -> Tensor:
    """Squared length up to which the sum of these rows is taken for rounding, 0-dim."""
    return column_square_sum(rows_NM).sum() * (NOISE * torch.finfo(rows_NM.dtype).eps) ** 2
