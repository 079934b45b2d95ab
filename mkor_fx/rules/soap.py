"""SOAP: Adam in the eigenbases of Shampoo's factors (Vyas et al., 2024, arXiv 2409.11321)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kinds import Kind
from .base import Rule, Shape, State, Use
from .bases import grams, into_bases, out_of_bases
from .direction import Gradient, Graft
from .hyper import Hyper, check_decay, check_positive
from .kronecker_factors import check_max_factor, sides_with_factor


@dataclass(frozen=True, kw_only=True)
class SOAP(Rule):
    """Adam, in bases that turn slowly, of the gradient alone: no rows are captured.

    With ``L``, ``R`` averages of ``G G^T`` and ``G^T G``, from zero, and ``Q_L``, ``Q_R`` their bases, at step ``t``:

        ``m <- beta1 m + (1 - beta1) G'``,  ``v <- beta2 v + (1 - beta2) G'^2``,  ``G' = Q_L^T G Q_R``
        ``D = sqrt(1 - beta2^t) / (1 - beta1^t) Q_L [m / (sqrt(v) + eps)] Q_R^T``

    which is the step itself, with the rate and weight decay of the weight's own group. The first gradient makes the bases,
    the eigenvectors of its own ``L`` and ``R``, and moves the weight by nothing but the decay; ``t`` counts from the second.
    Behind every ``derive_every``-th step columns are sorted by ``diag(Q^T L Q)``, largest first, and ``Q`` becomes that of
    the QR decomposition of ``L Q``; ``v`` is sorted alike, ``m`` is turned from the old bases to the new ones. So no
    gradient shapes the bases of its own step.

    Where there is none when bases are first due (it was zero or not finite, an expert has seen no row), the identity stands
    in for them, which is Adam, until they are due again; then they are made as above, and ``v`` goes along by the squares of
    their entries.

    State is ``2 (O^2 + I^2 + O I)`` numbers, a step costs ``6 O I (O + I)`` flops. A bias is left to the base optimizer, as
    which AdamW fits. An embedding's vocabulary, and a side above ``max_factor``, stays the identity; where both do, this is
    Adam. Convolutions are matrices of ``C kh kw`` inputs.

    Args:
        beta1: of the mean, in [0, 1).
        beta2: of the mean square, in [0, 1).
        decay: of the factors, in [0, 1).
        eps: added to the root of the mean square, > 0.
        derive_every: steps between two QR decompositions.
        max_factor: a side larger than this stays the identity; published: 10000.
        graft: ``"rms"`` brings each step to a root mean square of 0.2, None, as published, leaves Adam's.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    beta1: Hyper = 0.95
    beta2: Hyper = 0.95
    decay: Hyper = 0.95
    eps: Hyper = 1e-8
    derive_every: int = 10
    max_factor: int = 4096
    graft: Graft | None = None

    applies = "update"
    kinds = {  # noqa: RUF012
        "L": Kind.POSITIVE,
        "R": Kind.POSITIVE,
        "L_basis": Kind.ORTHOGONAL,
        "R_basis": Kind.ORTHOGONAL,
        "m": Kind.MOMENT,
        "v": Kind.MOMENT,
    }

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "decay"):
            check_decay(self, "0.95", name)
        check_positive(self, "eps", "1e-8")
        check_max_factor(self)

    def init(self, shape: Shape, device: torch.device) -> State:
        """``L``, ``R``, and ``m``, ``v`` ``[O, I]`` zero, bases the identity, float32; ``count`` of gradients,
        and whether bases were ``derived``."""
        sides = sides_with_factor(shape, self.max_factor)
        state = {name: torch.zeros(size, size, device=device) for name, size in sides.items()}
        state |= {f"{name}_basis": torch.eye(size, device=device) for name, size in sides.items()}
        state |= {name: torch.zeros(shape.O, shape.I, device=device) for name in ("m", "v")}
        flags = {"count": torch.int64, "derived": torch.float32}
        return state | {name: torch.zeros((), dtype=dtype, device=device) for name, dtype in flags.items()}

    def preconditions_bias(self, shape: Shape) -> bool:
        return False

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        return ()

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        return state

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        G = grad.weight.to(state["m"].dtype)
        turned, begun = into_bases(state, G), state["count"] > 0
        moved = {"m": (self.beta1, turned), "v": (self.beta2, turned.square())}
        moved |= {name: (self.decay, gram) for name, gram in grams(state, G).items()}
        new = {name: beta * state[name] + (1 - beta) * taken for name, (beta, taken) in moved.items()}
        new |= {name: torch.where(begun, new[name], state[name]) for name in ("m", "v")}
        return {**state, **new, "count": state["count"] + 1}

    def derive(self, state: State) -> State:
        """Bases by one orthogonal iteration from those before; the first by eigendecomposition, of factors above zero."""
        new, first = dict(state), state["derived"] == 0
        decomposes = _may_hold(first)
        for name, axis in (("L", 0), ("R", 1)):
            if name not in state:
                continue
            factor, old = state[name], state[f"{name}_basis"]
            product = factor @ old
            order = torch.argsort((old * product).sum(0), descending=True)
            basis, v = torch.linalg.qr(product.index_select(1, order))[0], new["v"].index_select(axis, order)
            if decomposes:
                basis = torch.where(first, torch.linalg.eigh(factor)[1].flip(-1), basis)
                v = torch.where(first, _along(axis, (basis.mT @ old).square(), new["v"]), v)
            new[f"{name}_basis"], new["m"], new["v"] = basis, _along(axis, basis.mT @ old, new["m"]), v
            new["derived"] = (factor.diagonal().sum() > 0).to(state["derived"].dtype)
        return new

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        m, v = state["m"], state["v"]
        taken = (state["count"].to(m.dtype) - 1).clamp_min(1)  # the first moved nothing: m is zero
        size = (1 - self.beta2**taken).sqrt() / (1 - self.beta1**taken)
        made = out_of_bases(state, size.to(m.dtype) * m / (v.sqrt() + self.eps))
        return Gradient(made.to(grad.weight.dtype), grad.bias)


def _along(axis: int, matrix: Tensor, of_OI: Tensor) -> Tensor:
    return matrix @ of_OI if axis == 0 else of_OI @ matrix.mT


def _may_hold(flag: Tensor) -> bool:
    """Whether a 0-dim flag is set, of a batch, whose values nobody can read, maybe: what it asks for is slow."""
    try:
        return bool(flag)
    except RuntimeError:
        return True
