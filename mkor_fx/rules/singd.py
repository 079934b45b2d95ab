"""SINGD, INGD and IKFAC: inverse factors in a structure, by products alone (Lin et al., 2312.05705 and 2302.09738)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype
from .base import Rule, Shape, State, Use
from .direction import Gradient, Graft
from .hyper import Hyper, check_kl_clip, check_positive
from .structure import Structure
from .structures import NAMES, Named, structure_of


@dataclass(frozen=True, kw_only=True)
class SINGD(Rule):
    """Natural gradient descent with structured inverse factors, without an inversion or a decomposition.

    ``K`` ``[I, I]`` and ``C`` ``[O, O]`` start at the identity and follow ``K K^T = R^-1`` and ``C C^T = L^-1`` of the
    factors ``R = a^T a / N`` and ``L = N g^T g`` of rows ``a`` of inputs and ``g`` of output gradients (which carry
    ``1/N``), up to a scale. ``P`` projects onto the structure, ``t(M)`` is the mean of a diagonal. At a refresh

        ``H_K = P(K^T R K)``, ``H_C = P(C^T L C)``, ``m <- alpha1 m + (t(H') H + damping t(Q') Q - 1) / 2``

        ``K <- K - beta1 K m_K``, ``C <- C - beta1 C m_C``

    for either side, with ``Q = P(K^T K)`` and a prime for the other side's; ``form="ikfac"`` has 1 in the place of both
    ``t``, so that ``K K^T`` follows ``(R + damping)^-1``. The direction of every step is

        ``D = C C^T G K K^T``, and ``C C^T b`` for a bias ``b``

    in which a base optimizer's weight decay has no part. A dense ``beta1 m`` with an eigenvalue above 1 turns ``K`` around
    and lets it grow without bound, which large or uncentred inputs soon do: ``bound`` keeps it from that.

    Numbers a side of ``d``, held twice (once with ``alpha1=0``), and sent at a refresh:

    =============== ============== ============== =================================================================
    structure       held           sent           ``K``
    =============== ============== ============== =================================================================
    "dense"         ``d^2``        ``d^2``        every matrix
    "diagonal"      ``d``          ``d``          a diagonal
    "block"         ``b d``        ``b d``        diagonal blocks of ``b = block``
    "triangular"    ``d(d+1)/2``   ``d(d+1)/2``   lower triangular
    "rank1"         ``2d - 1``     ``2d - 1``     a diagonal and the last row: ``(K K^T)^-1`` is diagonal plus rank one
    "hierarchical"  ``~(p+q+1)d``  ``~(p+q+1)d``  the first ``p`` rows, a diagonal, the last ``q``; ``(p, q) = corners``
    =============== ============== ============== =================================================================

    Of the first four ``P(R)`` is sent, of the last two ``H`` itself, of rows ``a K`` and ``g C``: they read the state and
    cannot be placed on owners. A direction costs ``4 O I`` flops times the numbers of ``K`` over ``d``, a side (a triangle
    counts as dense). An embedding's vocabulary, and a dense or triangular side above ``max_factor``, stays the identity: the
    other side then moves as with ``"ikfac"``.

    Args:
        structure: of both sides, or a pair, of ``C`` (outputs) and of ``K`` (inputs).
        form: ``"singd"``, which for ``structure="dense"`` is INGD, or ``"ikfac"``.
        damping: added to the curvature, > 0.
        beta1: length of a refresh, > 0; published: also rising, as ``lambda step: 2e-4 if step < 100 else 1e-2``.
        alpha1: Riemannian momentum, in [0, 1); published for IKFAC: 0.
        bound: ``"norm"`` (default): ``beta1 / max(1, n)`` in the place of ``beta1``, with ``n`` the largest sum of
            ``|m|`` over a row, of ``m`` with ``(1 - alpha1) / 2``: no eigenvalue of ``beta1 m`` exceeds ``beta1``.
            ``"entries"``: with the largest entry as ``n``, which the published code calls ``normalize_lr_cov`` and which
            bounds eigenvalues by ``d beta1`` only. None: ``beta1`` as it is, as published.
        block, corners: see the table.
        graft: what sizes a direction; None as published.
        kl_clip: see :class:`KFAC`, with ``graft=None``.
        max_factor: a dense or triangular side larger than this stays the identity.
        factor_dtype: of ``K``, ``C`` and their momenta. A refresh is computed in float32 (float64 for float64).

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    structure: Named | tuple[Named, Named] = "dense"
    form: Literal["singd", "ikfac"] = "singd"
    damping: Hyper = 1e-3
    beta1: Hyper = 1e-2
    alpha1: float = 0.5
    bound: Literal["norm", "entries"] | None = "norm"
    block: int = 30
    corners: tuple[int, int] = (15, 15)
    graft: Graft | None = "gradient"
    kl_clip: Hyper | None = None
    max_factor: int = 4096
    factor_dtype: torch.dtype = torch.float32

    kinds = dict.fromkeys(("K", "C", "K_momentum", "C_momentum"), Kind.MOMENT)

    def __post_init__(self) -> None:
        check_positive(self, "damping", "1e-3")
        check_positive(self, "beta1", "1e-2")
        check_kl_clip(self)
        pair = isinstance(self.structure, tuple) and len(self.structure) == 2
        if not all(name in NAMES for name in (self.structure if pair else (self.structure,))):
            raise ValueError(
                f"SINGD(structure={self.structure!r}): must be one of {', '.join(map(repr, NAMES))}, or a pair of them, of "
                "outputs and inputs"
            )
        for name, allowed in (("form", ("singd", "ikfac")), ("bound", ("norm", "entries", None))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"SINGD({name}={getattr(self, name)!r}): must be one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.alpha1, (int, float)) or not 0 <= self.alpha1 < 1:
            raise ValueError(f"SINGD(alpha1={self.alpha1!r}): must be a number in [0, 1), e.g. 0.5")
        whole = lambda value, least: isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole(self.block, 1):
            raise ValueError(f"SINGD(block={self.block!r}): must be an integer of at least 1")
        if not (isinstance(self.corners, tuple) and len(self.corners) == 2 and all(whole(c, 0) for c in self.corners)):
            raise ValueError(f"SINGD(corners={self.corners!r}): must be two integers, 0 or more, as (15, 15)")
        if not whole(self.max_factor, 0):
            raise ValueError(f"SINGD(max_factor={self.max_factor!r}): must be an integer, 0 (no factors) or more")
        if self.factor_dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"SINGD(factor_dtype={self.factor_dtype!r}): must be float32, bfloat16, float16 or float64")

    @property
    def reads_state(self) -> bool:  # type: ignore[override]
        return any(side.needs_rows for side in self._structures(Shape(1, 1)).values())

    def _structures(self, shape: Shape) -> dict[str, Structure]:
        """Of the factors that a weight of this shape has, as a use of it sees it: ``C`` lies along its own outputs."""
        outputs, inputs = (shape.I, shape.O) if shape.opposite else (shape.O, shape.I)
        sizes = {"C": outputs} if shape.lookup else {"C": outputs, "K": inputs}
        kinds = dict(zip("CK", (self.structure, self.structure) if isinstance(self.structure, str) else self.structure))
        sides = {name: structure_of(kinds[name], size, self.block, self.corners) for name, size in sizes.items()}
        bounded = {name for name in sides if kinds[name] in ("dense", "triangular")}
        return {name: side for name, side in sides.items() if side.size <= self.max_factor or name not in bounded}

    def without_state(self, shape: Shape) -> str:
        return f"both sides exceed max_factor={self.max_factor}"

    def init(self, shape: Shape, device: torch.device) -> State:
        """``K`` and ``C`` at the identity, in the numbers of their structure; with ``alpha1`` momenta of zeros."""
        state = {name: side.identity(device).to(self.factor_dtype) for name, side in self._structures(shape).items()}
        return state | ({f"{name}_momentum": torch.zeros_like(t) for name, t in state.items()} if self.alpha1 else {})

    def preconditions_bias(self, shape: Shape) -> bool:
        return "C" in self._structures(shape)

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor, state: State | None = None) -> tuple[Tensor, ...]:
        """``P(a^T a)`` and ``P(g^T g)``, of ``a K`` and ``g C`` where a structure needs rows; nothing of a bare side."""
        structures, made = self._structures(shape), []
        for rows, name in ((a_NI, "C" if shape.opposite else "K"), (g_NO, "K" if shape.opposite else "C")):
            wide, side = accumulation_dtype(rows.dtype), structures.get(name)
            if side is not None and side.needs_rows and state is not None:
                rows = side.times(rows.to(wide), state[name].to(wide))
            made.append(rows.new_zeros(0, dtype=wide) if side is None else side.gram(rows))
        return tuple(made)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = summary
        return inputs, outputs / (scale * scale)

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        sides = {n: s for n, s in self._structures(Shape(*grad.weight.shape)).items() if n in state}
        moments: dict[str, list[Tensor]] = {"C": [], "K": []}
        for use in uses:
            rows = use.rows.clamp_min(1)
            inputs, outputs = use.summary[0] / rows, use.summary[1] * rows
            for name, moment in zip("KC", (outputs, inputs) if use.opposite else (inputs, outputs)):
                moments[name].append(moment / len(uses))
        dtype = accumulation_dtype(self.factor_dtype)
        factors = {name: state[name].to(dtype) for name in sides}
        curved = {name: sides[name].congruence(factors[name], sum(moments[name]).to(dtype)) for name in sides}  # type: ignore
        squares = {name: sides[name].square(factors[name]) for name in sides}
        new = dict(state)
        for name, side in sides.items():
            other, shares = "C" if name == "K" else "K", [1, 1]  # the shares of an identity in the other's place
            if self.form == "singd" and other in sides:
                shares = [sides[other].mean_of_diagonal(of[other]) for of in (curved, squares)]  # type: ignore
            eye, length = side.identity(state[name].device).to(dtype), self.beta1
            moved = (shares[0] * curved[name] + self.damping * shares[1] * squares[name] - eye) / 2
            if self.alpha1:
                moved = moved * (1 - self.alpha1) if self.bound else moved
                moved = moved + self.alpha1 * state[f"{name}_momentum"].to(dtype)
                new[f"{name}_momentum"] = moved.to(self.factor_dtype)
            if self.bound:
                length = length / (side.bound(moved) if self.bound == "norm" else moved.abs().amax()).clamp_min(1)
            new[name] = (factors[name] - length * side.product(factors[name], moved)).to(self.factor_dtype)
        return new

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        sides = {n: s for n, s in self._structures(Shape(*grad.weight.shape)).items() if n in state}
        dtype = torch.float32 if grad.weight.dtype == torch.float16 else grad.weight.dtype  # whose range squares leave
        weight, bias = grad.to(dtype)
        if "K" in sides:
            weight = _twice(sides["K"], state["K"].to(dtype), weight)
        if "C" in sides:
            C = state["C"].to(dtype)
            weight = _twice(sides["C"], C, weight.mT).mT
            bias = None if bias is None else _twice(sides["C"], C, bias[None])[0]
        return Gradient(weight, bias).to(grad.weight.dtype)


def _twice(side: Structure, factor: Tensor, rows_ND: Tensor) -> Tensor:
    """``rows F F^T``"""
    return side.times(side.times(rows_ND, factor), factor, transposed=True)
