"""Thermodynamic K-FAC: factors inverted by a noisy physical process, simulated (arXiv 2502.08603)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import normals, uniforms
from .base import Shape, State, Use
from .direction import Gradient, Graft, Sides
from .hyper import Hyper, check_count, check_decay, check_kl_clip, check_positive
from .kronecker_factors import FactoredRule, averaged, check_max_factor, damped, sides_with_factor


@dataclass(frozen=True, kw_only=True)
class ThermodynamicKFAC(FactoredRule):
    """K-FAC whose inverses are what an analogue device would measure: a simulator, to see what noise and few bits cost.

    Factors and their damping are those of :class:`KFAC`. Every ``derive_every`` steps, outside of the step's program, each
    damped factor ``M``, divided by a bound of its largest eigenvalue, is what an Ornstein-Uhlenbeck process relaxes under,
    ``dX = -(M X - I) dt + sqrt(2 T) dw``, whose mean is ``M^-1``:

        ``X <- X - h (M X - I) + sqrt(2 T h) xi``, the mean of ``X`` over the last ``steps - burn_in`` of ``steps``

    with ``h`` the ``time_step``, ``T`` the ``temperature`` and ``xi`` standard normal, a hash of the number of the run: the
    same on every rank and after a resume. Without noise this is Richardson's iteration, from zero
    ``X_k = (I - (I - h M)^k) M^-1``: along an eigenvalue below ``1 / (h steps)`` of the bound it falls short of the inverse,
    until a ``warm_start`` from the last mean has caught up. Along an eigenvalue ``m`` noise leaves a variance of
    ``2 T / (m^2 h (steps - burn_in))``, so of every eigenvalue the same relative error. (The other way that such a device
    inverts, by the covariance of ``X`` over ``T``, has a relative error that no temperature makes smaller.)

    With ``bits``, what goes into the device and comes out of it is ``q round(x / q)``, ``q = max |x| / (2^(bits-1) - 1)``. A
    factor whose damping is smaller than ``q`` may get an eigenvalue below zero, along which the process grows: raise the
    damping. What is not finite leaves the last mean in place. Neither noise nor bits keep a mean positive definite.

    State are ``2 (I^2 + O^2)`` numbers, ``I^2 + O^2`` cross the network, a run costs ``2 steps (I^3 + O^3)`` flops here and
    time proportional to ``steps`` on a device. The sides of a direction are one run old, as K-FAC's. An embedding's
    vocabulary, and a side above ``max_factor``, stays the identity.

    Args:
        damping, decay, derive_every, pi, graft, kl_clip, max_factor: see :class:`KFAC`.
        temperature: ``T`` beside a largest eigenvalue of 1, 0 or more.
        time_step: ``h``, in (0, 2): beyond it the process diverges.
        steps: of a run, 1 or more.
        burn_in: steps before the mean is taken, below ``steps``; ``steps - 1`` takes the last ``X`` alone.
        warm_start: whether a run begins at the last mean; else at zero.
        bits: of what crosses into or out of the device, 2 or more; None: as it is.
        rounding: ``"nearest"``, or ``"stochastic"``: up with the probability of what is left, so unbiased.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    damping: Hyper = 1e-3
    decay: Hyper = 0.95
    derive_every: int = 10
    pi: bool = True
    temperature: float = 1e-4
    time_step: float = 1.0
    steps: int = 200
    burn_in: int = 100
    warm_start: bool = True
    bits: int | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    graft: Graft | None = "gradient"
    kl_clip: Hyper | None = None
    max_factor: int = 4096

    #: an inverse is the average of a noisy process, and may be indefinite
    kinds = {  # noqa: RUF012
        **{"L": Kind.POSITIVE, "R": Kind.POSITIVE},
        **{"L_inverse": Kind.MOMENT, "R_inverse": Kind.MOMENT},
    }

    def __post_init__(self) -> None:
        check_positive(self, "damping", "1e-3")
        check_decay(self, "0.95")
        check_max_factor(self)
        check_count(self, "steps")
        check_count(self, "burn_in", 0)
        where = f"{type(self).__name__}("
        if self.burn_in >= self.steps:
            raise ValueError(f"{where}burn_in={self.burn_in}, steps={self.steps}): leaves no step to average: must be below")
        if not self.temperature >= 0:
            raise ValueError(f"{where}temperature={self.temperature!r}): must be 0 (no noise) or more, e.g. 1e-4")
        if not 0 < self.time_step < 2:
            raise ValueError(f"{where}time_step={self.time_step!r}): must lie in (0, 2), where it is stable, e.g. 1")
        if self.bits is not None:
            check_count(self, "bits", 2)
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"{where}rounding={self.rounding!r}): must be 'nearest' or 'stochastic'")
        check_kl_clip(self)

    def init(self, shape: Shape, device: torch.device) -> State:
        """``L`` and ``R`` zero, their inverses the identity, float32; ``seen`` counts refreshes, ``runs`` of the process."""
        sides = sides_with_factor(shape, self.max_factor)
        if not sides:
            return {}
        state = {name: torch.zeros(size, size, device=device) for name, size in sides.items()}
        state |= {f"{name}_inverse": torch.eye(size, device=device) for name, size in sides.items()}
        counts = {"seen": torch.float32, "runs": torch.int64}
        return {**state, **{name: torch.zeros((), dtype=dtype, device=device) for name, dtype in counts.items()}}

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        return averaged(state, uses, self.decay)

    def derive(self, state: State) -> State:
        """One run for each factor that has seen a refresh."""
        made = {}
        for number, (name, factor) in enumerate(damped(state, self.damping, self.pi).items()):
            inverse = self.measured(factor, state[f"{name}_inverse"], state["runs"], number)
            usable = torch.isfinite(inverse).all() & (state["seen"] > 0)
            made[f"{name}_inverse"] = torch.where(usable, inverse, state[f"{name}_inverse"])
        return {**state, **made, "runs": state["runs"] + (state["seen"] > 0)}

    def measured(self, matrix_DD: Tensor, last_DD: Tensor, run: Tensor, number: int) -> Tensor:
        """The inverse of a positive definite matrix, as the device gives it, symmetric. ``number`` tells the matrices of one
        ``run`` apart."""
        given = self._quantised(matrix_DD, run, number)
        rows, length = given.abs().sum(-1).amax(), torch.linalg.vector_norm(given)
        bound = torch.minimum(rows, length)  # neither is below the largest eigenvalue
        start = torch.zeros_like(given)
        if self.warm_start:
            start = torch.where(run > 0, last_DD * bound, start)
        mean = self._quantised(self.relaxed(given / bound, start, run, number), run, number + 2) / bound
        return (mean + mean.mT) / 2

    def relaxed(self, matrix_DD: Tensor, start_DD: Tensor, run: Tensor, number: int) -> Tensor:
        """The mean of the process over the steps behind ``burn_in``. Its eigenvalues are at most 1."""
        eye = torch.eye(matrix_DD.shape[-1], dtype=matrix_DD.dtype, device=matrix_DD.device)
        X, total, size = start_DD, torch.zeros_like(start_DD), (2 * self.temperature * self.time_step) ** 0.5
        for k in range(self.steps):
            X = X - self.time_step * (matrix_DD @ X - eye)
            if size:
                X = X + size * normals(run, 2 * k + number, X.numel(), X.dtype).view_as(X)
            total = total + X if k >= self.burn_in else total
        return total / (self.steps - self.burn_in)

    def _quantised(self, x_DD: Tensor, run: Tensor, number: int) -> Tensor:
        if self.bits is None:
            return x_DD
        quantum = x_DD.abs().amax() / (2 ** (self.bits - 1) - 1)
        if self.rounding == "nearest":
            return quantum * (x_DD / quantum).round()
        drawn = uniforms(run, 4 * self.steps + number, x_DD.numel(), x_DD.dtype).view_as(x_DD)
        return quantum * (x_DD / quantum + drawn.triu() + drawn.triu(1).mT).floor()  # symmetric as what it rounds

    def sides(self, state: State) -> Sides:
        return Sides(state.get("L_inverse"), state.get("R_inverse"))
