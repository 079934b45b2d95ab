"""CG-FAC: K-FAC's curvature inverted by conjugate gradients (Chen, 2021, arXiv 2101.00218)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype, sketch
from .base import Shape, State, Use
from .direction import Gradient, Graft
from .hyper import Hyper, check_count, check_decay, check_kl_clip, check_positive, number
from .kronecker_factors import FactoredRule, averaged, check_max_factor, sides_with_factor


@dataclass(frozen=True, kw_only=True)
class CGFAC(FactoredRule):
    """K-FAC without an inverse: every step solves for its direction by a few conjugate-gradient iterations.

    With K-FAC's averages ``L = N g^T g`` and ``R = a^T a / N`` of rows ``a`` of inputs and ``g`` of output gradients, ``D``
    minimises ``<D, Op(D)> / 2 - <D, G>`` over a Krylov space of ``iterations`` dimensions:

        ``Op(D) = L D R + damping D``

    that is ``(L (x) R + damping)^-1 G`` once they are as many as there are distinct products of eigenvalues. The iteration
    stands still where the squared residual is below ``tolerance |G|^2``. With ``warm_start`` it begins at the best multiple
    of the last direction, that with the least of the same function; so ``<D, G> > 0`` whatever it has come to. A bias is a
    weight of one input that is always 1: ``(L + damping)^-1 b``.

    ``curvature`` says what is multiplied:

    - ``"factors"``: the averages, ``I^2 + O^2`` numbers, as many across the network. An iteration costs ``2 O I (O + I)``
      flops.
    - ``"sketches"``: matrix-free, ``L = X^T X`` and ``R = Y^T Y`` of ``rank`` random-sign sums ``X`` and ``Y`` of the last
      refresh's rows, so ``E[L (x) R]`` is that of the rows. No factor is made; ``rank (O + I)`` numbers are state and cross
      the network, and an iteration costs ``4 rank O I + 4 rank^2 I`` flops. With the rows themselves in their place the
      product would be exact, but rows are summed away where they arise, over micro-batches and ranks: keeping them would
      take ``N (O + I)`` numbers until the last micro-batch is over, in shapes that change with ``N``.

    An embedding's vocabulary, and with ``factors`` a side above ``max_factor``, stays the identity.

    Args:
        damping: added to the curvature, > 0.
        decay: weight of the old average, in [0, 1); of no meaning to ``sketches``.
        iterations: of conjugate gradients, 1 or more; all run, those behind convergence change nothing.
        tolerance: squared residual over ``|G|^2`` at which it has converged, 0 or more.
        warm_start: whether to begin at the last direction; published: at zero.
        curvature: see above.
        rank: sketches a side, 1 or more; of no meaning to ``factors``.
        graft: what sizes a direction.
        kl_clip: a bound on all steps together, with ``graft=None``, see :class:`KFAC`.
        max_factor: a side with a factor is no larger.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    damping: Hyper = 1e-3
    decay: Hyper = 0.95
    iterations: int = 10
    tolerance: Hyper = 1e-2
    warm_start: bool = True
    curvature: Literal["factors", "sketches"] = "factors"
    rank: int = 64
    graft: Graft | None = "gradient"
    kl_clip: Hyper | None = None
    max_factor: int = 4096

    kinds = {  # noqa: RUF012
        **{"L": Kind.POSITIVE, "R": Kind.POSITIVE},
        **dict.fromkeys(("L_rows", "R_rows", "solution", "bias_solution"), Kind.MOMENT),
    }

    def __post_init__(self) -> None:
        check_positive(self, "damping", "1e-3")
        check_decay(self, "0.95")
        check_max_factor(self)
        for name in ("iterations", "rank"):
            check_count(self, name)
        if not number(self.tolerance, "CGFAC(tolerance=") >= 0:
            raise ValueError(f"CGFAC(tolerance={self.tolerance!r}): must be 0 (never) or more, e.g. 1e-2")
        if self.curvature not in ("factors", "sketches"):
            raise ValueError(f"CGFAC(curvature={self.curvature!r}): must be 'factors' or 'sketches'")
        check_kl_clip(self)

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.curvature == "sketches"

    def init(self, shape: Shape, device: torch.device) -> State:
        """``L`` and ``R`` (or ``L_rows`` ``[rank, O]`` and ``R_rows`` ``[rank, I]``) and the last ``solution``, zero,
        float32; ``seen`` counts refreshes."""
        sides = sides_with_factor(shape, self.max_factor)
        if self.draws:
            sides = {"L": shape.O} if shape.lookup else {"L": shape.O, "R": shape.I}
            state = {f"{name}_rows": torch.zeros(self.rank, size, device=device) for name, size in sides.items()}
        else:
            state = {name: torch.zeros(size, size, device=device) for name, size in sides.items()}
        if not state:
            return {}
        state["solution"] = torch.zeros(shape.O, shape.I, device=device)
        if shape.bias and "L" in sides:
            state["bias_solution"] = torch.zeros(shape.O, 1, device=device)
        return {**state, "seen": torch.zeros((), device=device)}

    def preconditions_bias(self, shape: Shape) -> bool:
        return self.draws or super().preconditions_bias(shape)

    def summarize(  # type: ignore[override]
        self, shape: Shape, a_NI: Tensor, g_NO: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """``a^T a`` and ``g^T g``, or sketches of ``a`` and ``g``; nothing of a side without a factor."""
        if key is None:
            return super().summarize(shape, a_NI, g_NO)
        inputs = g_NO.new_zeros(0, dtype=torch.float32) if shape.lookup else sketch(a_NI, key, 0, self.rank)
        return inputs, sketch(g_NO, key, 1, self.rank)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = summary
        return (inputs, outputs / scale) if self.draws else super().unscale(summary, scale)

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        if not self.draws:
            return averaged(state, uses, self.decay)
        new: State = {}
        for use in uses:
            inputs, outputs = use.summary
            share = (use.rows.clamp_min(1) / (self.rank * len(uses))).sqrt()
            of_inputs, of_outputs = inputs * share / use.rows.clamp_min(1), outputs * share
            pair = {"L_rows": of_inputs if use.opposite else of_outputs, "R_rows": of_outputs if use.opposite else of_inputs}
            for name in pair.keys() & state.keys():  # sketches of several uses add up, as those of several ranks
                new[name] = new.get(name, torch.zeros_like(state[name])) + pair[name].to(state[name].dtype)
        return {**state, **new, "seen": state["seen"] + 1}

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        """The solution for this step's gradient."""
        G, b = grad.to(accumulation_dtype(grad.weight.dtype))
        columns = {"solution": G} | ({} if b is None or "bias_solution" not in state else {"bias_solution": b[:, None]})
        known = {name: t.to(G.dtype) for name, t in state.items() if name.startswith(("L", "R"))}
        solved = {}
        for name, column in columns.items():
            used = known if name == "solution" else {side: t for side, t in known.items() if side.startswith("L")}
            start = state[name].to(G.dtype) if self.warm_start else None
            solved[name] = self._solve(used, column, start).to(state[name].dtype)
        return {**state, **solved}

    def _solve(self, known: State, G: Tensor, start: Tensor | None) -> Tensor:
        def curvature(V: Tensor) -> Tensor:
            damping: Tensor = self.damping * V
            if "L_rows" in known:
                V = known["L_rows"] @ V
            V = V @ known["R"] if "R" in known else V @ known["R_rows"].mT @ known["R_rows"] if "R_rows" in known else V
            V = known["L"] @ V if "L" in known else known["L_rows"].mT @ V if "L_rows" in known else V
            return V + damping

        return conjugate_gradients(curvature, G, start, self.iterations, self.tolerance)

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        bias = grad.bias
        if bias is not None and "bias_solution" in state:
            bias = state["bias_solution"][:, 0].to(bias.dtype)
        return Gradient(state["solution"].to(grad.weight.dtype), bias)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], G: Tensor, start: Tensor | None, iterations: int, tolerance: Hyper
) -> Tensor:
    """``V`` with ``operator(V)`` near ``G``, of a positive definite symmetric ``operator``, by ``iterations`` steps from 0
    or from the best multiple of ``start`` (Hestenes and Stiefel, 1952). Steps behind ``|residual|^2 <= tolerance |G|^2``
    change nothing. Where it overflows, ``G``."""
    V, residual = torch.zeros_like(G), G
    if start is not None:
        image = operator(start)
        best = _quotient((start * G).sum(), (start * image).sum())
        V, residual = best * start, G - best * image
    direction, square, enough = residual, residual.square().sum(), tolerance * G.square().sum()
    for _ in range(iterations):
        image = operator(direction)
        alpha = torch.where(square > enough, _quotient(square, (direction * image).sum()), torch.zeros_like(square))
        V, residual = V + alpha * direction, residual - alpha * image
        new = residual.square().sum()
        direction, square = residual + _quotient(new, square) * direction, new
    return torch.where(torch.isfinite(square), V, G)


def _quotient(one: Tensor, other: Tensor) -> Tensor:
    """Zero over nothing."""
    return torch.where(other > 0, one / other, torch.zeros_like(one))
