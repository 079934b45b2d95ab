"""KLD-WRM: K-FAC's average of curvatures read as a wake of earlier steps (Puiu, ECML PKDD 2022, arXiv 2204.04718)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype
from .base import Shape, State, Use
from .direction import Gradient, Graft, from_sides
from .hyper import Hyper, number
from .kfac import KFAC
from .kronecker_factors import moments


@dataclass(frozen=True, kw_only=True)
class KLDWRM(KFAC):
    """K-FAC whose steps are regularised by their divergence from all earlier networks, not from the last one alone.

    An exponential average ``F`` of curvatures ``F_i`` is what the divergences from the networks ``W_i`` of earlier steps
    amount to, each weighted by ``decay^(k-i)``, if their gradients along the way are not left out, as K-FAC does. The step
    ``-rate D_k`` that minimises, with ``w_0 = 1`` and ``w_i = 1 - decay``,

        ``<G_k, S> [+ <S, B_k S> / 2] + 1/(2 rate_k) sum_i decay^(k-i) w_i <W_k + S - W_i, F_i (W_k + S - W_i)>``

    is that of K-FAC for a moved gradient, with ``t = rate_{k-1} / rate_k`` and ``P_0 = 0``:

    - ``variant="so"``, without the term in brackets: ``M = G_k - decay t G_{k-1}``, ``D = F^-1 M``.
    - ``variant="q"``, with ``B_k = F_k``, this step's own curvature: ``M = G_k + decay t P_k``,
      ``D = (F + rate F_k)^-1 M``, ``P_{k+1} = decay t P_k - F D``.

    ``F`` is the Kronecker product of K-FAC's factors, with its damping. For ``"q"`` they are added side by side,
    ``(L + rate L_k) (x) (R + rate R_k)``, as published; that is exact for one factor only. As with :class:`KFAC` a step
    inverts factors of an earlier one (``inverse="newton"``: its own); until the first inverse is made ``D = M``, and
    ``P = -G``. Between refreshes ``P`` takes ``F D`` itself, where the published code takes ``M / (1 + rate)``.

    The variant with the exact divergence (QE) is not one of them: it differentiates at the networks of earlier steps. Nor is
    the published bound of 1.5 on a direction's root mean square. Momentum and ``kl_clip``, where it acts, make the base
    optimizer's step another than ``-rate D``; meant for SGD: Adam would size differences of gradients by themselves. While
    gradients agree, ``"so"`` steps are ``1 - decay`` times those of K-FAC; but where the curvature is ``h``, they converge
    for ``rate h / F < 2 / (1 + decay)`` only, K-FAC's for 2.

    State is that of K-FAC and ``2 O I`` more, the wake and the direction, of a bias alike; for ``"q"`` also ``O^2 + I^2``. A
    step costs K-FAC's, for ``"q"`` two more products of the same size. What crosses the network is K-FAC's
    ``I^2 + O^2`` numbers a layer, at refreshes.

    Args:
        variant: see above.
        rate: the base optimizer's learning rate, as the same number, tensor or function of the step; None (``"so"`` only):
            it does not change.
        decay: weight of the old average, in [0, 1).
        damping, derive_every, inverse, pi, newton_steps, graft, kl_clip, max_factor: as in :class:`KFAC`; published are
            ``derive_every=1`` with a refresh in each step, and ``inverse="eigen"``.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    variant: Literal["so", "q"] = "so"
    rate: Hyper | None = None
    decay: Hyper = 0.99
    damping: Hyper = 1e-2
    inverse: Literal["cholesky", "eigen", "newton"] = "eigen"
    graft: Graft | None = None
    kl_clip: Hyper | None = 1e-3

    kinds = {  # noqa: RUF012
        **KFAC.kinds,
        **dict.fromkeys(("L_now", "R_now"), Kind.POSITIVE),
        **dict.fromkeys(("wake", "bias_wake", "direction", "bias_direction"), Kind.MOMENT),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "qe":
            raise ValueError(
                "KLDWRM(variant='qe'): differentiates the divergence at the networks of earlier steps, whose outputs and "
                "backwards no rule sees: use 'q'"
            )
        if self.variant not in ("so", "q"):
            raise ValueError(f"KLDWRM(variant={self.variant!r}): must be 'so' or 'q'")
        if self.rate is None and self.variant == "q":
            raise ValueError(
                "KLDWRM(variant='q', rate=None): weighs this step's curvature by the learning rate: give the base "
                "optimizer's, a number or a function of the step"
            )
        if self.rate is not None and not number(self.rate, "KLDWRM(rate=") >= 0:
            raise ValueError(f"KLDWRM(rate={self.rate!r}): must not be negative, the base optimizer's learning rate")

    def overrides(self, function: str) -> bool:
        return function == "precondition" or super().overrides(function)

    def init(self, shape: Shape, device: torch.device) -> State:
        """K-FAC's state; ``wake`` and ``direction`` ``[O, I]``, ``bias_wake`` and ``bias_direction`` ``[O]``, zero; the last
        ``rate``; for ``"q"`` ``L_now`` and ``R_now``, the latest statistics."""
        state = super().init(shape, device)
        if not state:
            return state
        sizes: dict[str, tuple[int, ...]] = {"": (shape.O, shape.I)}
        sizes |= {"bias_": (shape.O,)} if shape.bias and self.preconditions_bias(shape) else {}
        new = {f"{part}{name}": size for part, size in sizes.items() for name in ("wake", "direction")}
        new |= {} if self.rate is None else {"rate": ()}
        if self.variant == "q":
            new |= {f"{name}_now": tuple(state[name].shape) for name in ("L", "R") if name in state}
            new |= {"derived": ()} if self.inverse == "cholesky" else {}
        return {**state, **{name: torch.zeros(size, device=device) for name, size in new.items()}}

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        if self.variant == "q":
            state = {**state, **{f"{name}_now": moment for name, moment in moments(state, uses).items()}}
        return super().update(state, uses, grad, step)

    def _curvature(self, state: State) -> State:
        factors, rate = super()._curvature(state), self.rate
        if self.variant == "so" or rate is None:
            return factors
        return {name: factor + rate * state[f"{name}_now"] for name, factor in factors.items()}

    def derive(self, state: State) -> State:
        new = super().derive(state)
        return {**new, "derived": state["seen"]} if "derived" in state else new

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        dtype = accumulation_dtype(grad.weight.dtype)
        grad, keeps = grad.to(dtype), self.decay
        rate: State = {}
        if self.rate is not None:
            rate["rate"] = torch.ones_like(state["rate"]) * self.rate
            changes = (state["rate"] > 0) & (rate["rate"] > 0)
            keeps = keeps * torch.where(changes, state["rate"] / rate["rate"], torch.ones_like(state["rate"]))
        names = {"": grad.weight} | ({"bias_": grad.bias} if grad.bias is not None and "bias_wake" in state else {})
        wakes = {name: keeps * state[f"{name}wake"].to(dtype) for name in names}
        moved = {name: G + wakes[name] for name, G in names.items()}
        made = self._solved(state, Gradient(moved[""], moved.get("bias_")))
        directions = {"": made.weight} if made.bias is None else {"": made.weight, "bias_": made.bias}
        left = {name: -G for name, G in names.items()}
        if self.variant == "q":
            ready = state["derived" if "derived" in state else "seen"] > 0
            curved = self._curved(state, made)
            left = {name: torch.where(ready, wakes[name] - curved[name], old) for name, old in left.items()}
        new = {f"{name}wake": t for name, t in left.items()} | {f"{name}direction": directions[name] for name in names}
        return {**state, **{name: t.to(state[name].dtype) for name, t in {**new, **rate}.items()}}

    def _solved(self, state: State, grad: Gradient) -> Gradient:
        return super().precondition(state, grad) if self.inverse == "eigen" else from_sides(self, state, grad, None)[0]

    def _curved(self, state: State, made: Gradient) -> dict[str, Tensor]:
        """``F D``, of a bias ``L`` with its damping times its direction."""
        dtype, whole = made.weight.dtype, self.inverse == "eigen"
        factors = super()._curvature(state)
        factors = {name: t.to(dtype) for name, t in (factors if whole else self._damped(factors)).items()}
        weight = factors["L"] @ made.weight if "L" in factors else made.weight
        curved = {"": weight @ factors["R"] if "R" in factors else weight}
        if made.bias is not None:
            curved["bias_"] = factors["L"] @ made.bias if "L" in factors else made.bias
        plain = {"": made.weight} if made.bias is None else {"": made.weight, "bias_": made.bias}
        return {name: t + (self.damping if whole else 0.0) * plain[name] for name, t in curved.items()}

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        """What ``advance`` has made."""
        bias = grad.bias if grad.bias is None or "bias_direction" not in state else state["bias_direction"]
        return Gradient(state["direction"], bias).to(grad.weight.dtype)
