"""K-FAC: averaged Kronecker factors and their inverses (Martens & Grosse, 1503.05671; KAISA, 2107.01739)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype
from .base import Shape, State, Use
from .bases import into_bases, out_of_bases
from .direction import Gradient, Graft, Sides
from .hyper import Hyper, check_count, check_decay, check_kl_clip, check_positive
from .kronecker_factors import FactoredRule, averaged, check_max_factor, damped, sides_with_factor


@dataclass(frozen=True, kw_only=True)
class KFAC(FactoredRule):
    """Kronecker-factored curvature with damped inverses.

    With rows ``a`` of inputs and ``g`` of output gradients, ``N`` of them, the factors are averages of
    ``R = a^T a / N`` and ``L = N g^T g`` (``g`` carries ``1/N``), each averaged as ``F <- decay F + (1 - decay) F_new`` with
    the first statistic taken as it is. With ``pi = sqrt((tr R / I) / (tr L / O))`` the damping is shared out:

        ``D = (L + sqrt(damping) / pi)^-1 G (R + pi sqrt(damping))^-1``

    or, with ``pi=False``, it is added to each, as KAISA does: ``(L + damping)^-1 G (R + damping)^-1``. ``inverse`` says
    how:

    - ``"cholesky"``: every ``derive_every`` steps, outside of the step's program, by eager ``torch.linalg`` calls that may
      wait for the device.
    - ``"eigen"``: likewise, by eigenvectors ``Q`` and eigenvalues ``q``; the damping goes to the products of both, which is
      the exact inverse of ``L (x) R + damping``:  ``D = Q_L [(Q_L^T G Q_R) / (q_L q_R^T + damping)] Q_R^T``
    - ``"newton"``: in the program, at every refresh, ``newton_steps`` of ``X <- 2 X - X A X`` from the inverse before. No
      decomposition; a new factor takes a few refreshes, in which ``X`` lies between a multiple of the identity and ``A^-1``.
      In float32 conditions up to 1e4 are resolved, beyond them ``X`` stays short of ``A^-1`` and positive definite.

    A step uses the inverses of an earlier one (``newton``: of its own refresh); until the first are made, the gradient
    itself. What crosses the network is ``I^2 + O^2`` numbers a layer. An embedding's vocabulary, and a side above
    ``max_factor``, stays the identity.

    Args:
        damping: added to the curvature, > 0.
        decay: weight of the old average, in [0, 1).
        derive_every: steps between two inversions or decompositions; of no meaning to ``newton``.
        inverse: see above.
        pi: whether the damping is shared out by the factors' traces; of no meaning to ``eigen``.
        newton_steps: two products of the factor's size each, 1 or more.
        graft: what sizes a direction; ``"gradient"`` stands in for K-FAC's clip of the KL divergence, layer by layer.
        kl_clip: that clip itself, with ``graft=None``: all directions times ``min(1, sqrt(kl_clip / |sum lr^2 <D, G>|))``.
        max_factor: a side larger than this stays the identity.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    damping: Hyper = 1e-3
    decay: Hyper = 0.95
    derive_every: int = 10
    inverse: Literal["cholesky", "eigen", "newton"] = "cholesky"
    pi: bool = True
    newton_steps: int = 3
    graft: Graft | None = "gradient"
    kl_clip: Hyper | None = None
    max_factor: int = 4096

    kinds = {  # noqa: RUF012
        "L": Kind.POSITIVE,
        "R": Kind.POSITIVE,
        "L_inverse": Kind.POSITIVE,
        "R_inverse": Kind.POSITIVE,
        "L_basis": Kind.ORTHOGONAL,
        "R_basis": Kind.ORTHOGONAL,
    }

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_positive(self, "damping", "1e-3")
        check_decay(self, "0.95")
        check_max_factor(self)
        if self.inverse not in ("cholesky", "eigen", "newton"):
            raise ValueError(f"{name}(inverse={self.inverse!r}): must be 'cholesky', 'eigen' or 'newton'")
        check_count(self, "newton_steps")
        check_kl_clip(self)

    def overrides(self, function: str) -> bool:
        own = {"derive": self.inverse != "newton", "precondition": self.inverse == "eigen", "sides": self.inverse != "eigen"}
        return super().overrides(function) and own.get(function, True)

    def init(self, shape: Shape, device: torch.device) -> State:
        """``L`` and ``R`` zero, their inverses (``eigen``: bases) the identity, float32; ``seen`` counts refreshes."""
        sides = sides_with_factor(shape, self.max_factor)
        state = {name: torch.zeros(size, size, device=device) for name, size in sides.items()}
        made = "basis" if self.inverse == "eigen" else "inverse"
        state |= {f"{name}_{made}": torch.eye(size, device=device) for name, size in sides.items()}
        if self.inverse == "eigen" and state:
            state |= {f"{name}_values": torch.zeros(size, device=device) for name, size in sides.items()}
            state["derived"] = torch.zeros((), device=device)
        return {**state, "seen": torch.zeros((), device=device)} if state else {}

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        new = averaged(state, uses, self.decay)
        if self.inverse == "newton":
            for name, factor in self._damped(self._curvature(new)).items():
                new[f"{name}_inverse"] = newton_inverse(factor, state[f"{name}_inverse"], self.newton_steps)
        return new

    def _curvature(self, state: State) -> State:
        """``L`` and ``R`` that a direction inverts, those that there are."""
        return {name: state[name] for name in ("L", "R") if name in state}

    def derive(self, state: State) -> State:
        """The damped inverses by Cholesky, or bases and eigenvalues, of factors that have seen a refresh."""
        seen, made = state["seen"] > 0, {}
        if self.inverse == "eigen":
            for name, factor in self._curvature(state).items():
                values, made[f"{name}_basis"] = torch.linalg.eigh((factor + factor.mT) / 2)
                made[f"{name}_values"] = values.clamp_min(0)
            made["derived"] = state["seen"]
        else:
            for name, factor in self._damped(self._curvature(state)).items():
                made[f"{name}_inverse"] = torch.cholesky_inverse(torch.linalg.cholesky(factor))
        return {**state, **{key: torch.where(seen, new, state[key]) for key, new in made.items()}}

    def _damped(self, factors: State) -> dict[str, Tensor]:
        return damped(factors, self.damping, self.pi)

    def sides(self, state: State) -> Sides:
        return Sides(state.get("L_inverse"), state.get("R_inverse"))

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        """In the bases of both factors; a bias is a weight of one input that is always 1."""
        if self.inverse != "eigen":
            return super().precondition(state, grad)
        given, ready = grad.weight.dtype, state["derived"] > 0
        dtype = accumulation_dtype(given)  # in float16 products of eigenvalues overflow
        (weight, bias), (of_weight, of_bias) = grad.to(dtype), (q.to(dtype) + self.damping for q in self.curvature(state))
        made = out_of_bases(state, into_bases(state, weight) / of_weight)
        if bias is not None and "L_basis" in state:
            Q_L = state["L_basis"].to(dtype)
            bias = torch.where(ready, Q_L @ ((Q_L.mT @ bias) / of_bias), bias)
        return Gradient(torch.where(ready, made, weight), bias).to(given)

    def curvature(self, state: State) -> tuple[Tensor, Tensor]:
        """In the bases: of a weight ``q_L q_R^T``, ``[O, I]``, of a bias ``q_L``, ``[O]``; 1 of a side without a factor."""
        one = torch.ones_like(state["derived"]).unsqueeze(0)
        q_L, q_R = (state.get(f"{name}_values", one) for name in ("L", "R"))
        return q_L.unsqueeze(-1) * q_R, q_L


def newton_inverse(matrix_DD: Tensor, guess_DD: Tensor, steps: int) -> Tensor:
    """``steps`` of ``X <- 2 X - X A X`` (Schulz, 1933) from a symmetric positive definite guess, ``[D, D]``.

    It converges, and keeps ``X`` positive definite, while the eigenvalues of ``A X`` lie in (0, 2); after a step they lie in
    (0, 1]. A guess that may be too far away is scaled down first, by a bound that the converged one does not reach: the
    smaller of the largest row sum of ``|M|``, ``M = A X``, and ``sqrt |M^2|``, which exceeds the eigenvalue by ``D^(1/4)``
    at most. Three steps and more make up for that at every refresh.
    """
    product = matrix_DD @ guess_DD
    rows = product.abs().sum(-1).amax(-1)
    square = torch.linalg.vector_norm(product @ product, dim=(-2, -1)).sqrt()
    bound = torch.minimum(rows, square)[..., None, None]
    guess_DD = guess_DD * torch.where(bound < 1.9, torch.ones_like(bound), 1 / bound)
    for _ in range(steps):
        step = 2 * guess_DD - guess_DD @ matrix_DD @ guess_DD
        guess_DD = (step + step.mT) / 2
    return guess_DD
