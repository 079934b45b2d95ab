"""Shampoo: inverse roots of sums of gradients' products (Gupta, Koren and Singer, 2018, arXiv 1802.09568)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from .base import Rule, Shape, State, Use
from .bases import grams
from .direction import Gradient, Graft, Normalized, Sides
from .hyper import Hyper, check_count, check_positive
from .kronecker_factors import check_max_factor, sides_with_factor


@dataclass(frozen=True, kw_only=True)
class Shampoo(Rule):
    """Inverse ``p``-th roots of the gradient's own second moments, of the gradient alone: no rows are captured.

    Every step ``L <- beta L + (1 - beta) G G^T`` and ``R <- beta R + (1 - beta) G^T G``, from zero, corrected by
    ``1 - beta^t``; with ``beta=1`` plain sums. With ``|A|`` the Frobenius norm and ``p = 4`` (2 if one side has no factor):

        ``D = (L + damping |L| I)^(-1/p) G (R + damping |R| I)^(-1/p)``

    ``root`` says how, and when:

    - ``"eigh"``: every ``derive_every`` steps, outside of the step's program, by eigendecomposition. A step uses the roots
      of an earlier one; until the first are made, the gradient itself.
    - ``"newton"``: in the program, at every refresh, of factors with the step's own gradient, by ``newton_steps`` of
      :func:`inverse_root`. No decomposition, nothing waits for the device.

    State is ``2 (O^2 + I^2)`` numbers, statistics cost ``2 O I (O + I)`` flops a step and the direction as many. A bias is
    left to the base optimizer. An embedding's vocabulary, and a side above ``max_factor``, stays the identity. Convolutions
    are matrices of ``C kh kw`` inputs.

    Args:
        beta: weight of the old factor, in [0, 1].
        damping: share of a factor's norm that is added to it, > 0; a float32 ``"newton"`` needs 1e-6.
        root: see above.
        derive_every: steps between two eigendecompositions; of no meaning to ``"newton"``, which goes by ``refresh_every``.
        newton_steps: 1 or more, of four products of the factor's size for ``p = 4``; eigenvalues below about
            ``2.4^(5 - newton_steps)`` of the norm are damped.
        order: ``p``, the same for all, 1 or more; None: as above.
        graft: what sizes a direction; ``"gradient"`` is grafting onto SGD (arXiv 2002.11803).
        magnitude: with ``graft=None``, whose size a direction has: that of AdaGrad's step, ``G / (sqrt(sum G^2) + eps)``, or
            of RMSprop's, Adam's without its mean, ``G / (sqrt(v / (1 - beta2^t)) + eps)``. Keeps ``O I`` numbers more.
        beta2: of ``"rmsprop"``, in [0, 1).
        eps: of ``magnitude``, > 0.
        max_factor: a side larger than this stays the identity.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    beta: float = 1.0
    damping: Hyper = 1e-6
    root: Literal["eigh", "newton"] = "eigh"
    derive_every: int = 10
    newton_steps: int = 20
    order: int | None = None
    graft: Graft | None = "gradient"
    magnitude: Literal["adagrad", "rmsprop"] | None = None
    beta2: float = 0.999
    eps: float = 1e-10
    max_factor: int = 4096

    kinds = {  # noqa: RUF012
        "L": Kind.POSITIVE,
        "R": Kind.POSITIVE,
        "L_root": Kind.POSITIVE,
        "R_root": Kind.POSITIVE,
        "squares": Kind.MOMENT,
    }

    def __post_init__(self) -> None:
        check_positive(self, "damping", "1e-6")
        check_positive(self, "eps", "1e-10")
        for name, ends in (("beta", "[0, 1]"), ("beta2", "[0, 1)")):
            value = getattr(self, name)
            inside = isinstance(value, (int, float)) and (0 <= value < 1 or (value == 1 and name == "beta"))
            if isinstance(value, bool) or not inside:
                raise ValueError(f"Shampoo({name}={value!r}): the weight of the old average must be a number in {ends}")
        for name, allowed in (("root", ("eigh", "newton")), ("magnitude", (None, "adagrad", "rmsprop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Shampoo({name}={getattr(self, name)!r}): must be one of {', '.join(map(repr, allowed))}")
        check_max_factor(self)
        check_count(self, "newton_steps")
        if self.order is not None:
            check_count(self, "order")
        if self.magnitude is not None and self.graft is not None:
            raise ValueError(
                f"Shampoo(magnitude={self.magnitude!r}, graft={self.graft!r}): either sizes directions: use graft=None with "
                "magnitude"
            )

    @property
    def reads_gradient(self) -> bool:  # type: ignore[override]
        return self.root == "newton"

    def overrides(self, function: str) -> bool:
        optional = {"derive": self.root == "eigh", "normalize": self.magnitude is not None}
        return super().overrides(function) and optional.get(function, True)

    def without_state(self, shape: Shape) -> str:
        return f"both sides exceed max_factor={self.max_factor}"

    def init(self, shape: Shape, device: torch.device) -> State:
        """``L``, ``R`` and ``squares`` ``[O, I]`` zero, roots the identity, float32; ``count`` of gradients."""
        sides = sides_with_factor(shape, self.max_factor)
        if not sides:
            return {}
        state = {name: torch.zeros(size, size, device=device) for name, size in sides.items()}
        state |= {f"{name}_root": torch.eye(size, device=device) for name, size in sides.items()}
        if self.magnitude is not None:
            state["squares"] = torch.zeros(shape.O, shape.I, device=device)
        return {**state, "count": torch.zeros((), dtype=torch.int64, device=device)}

    def preconditions_bias(self, shape: Shape) -> bool:
        return False

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        return ()

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        """With ``root="newton"`` the roots of what the factors are with this step's gradient."""
        return state if self.root == "eigh" else {**state, **self._roots({**state, **self._factors(state, grad)})}

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        new = {**state, **self._factors(state, grad)}
        if self.magnitude is not None:
            beta = 1.0 if self.magnitude == "adagrad" else self.beta2
            new["squares"] = _averaged(state["squares"], grad.weight.to(state["squares"].dtype).square(), beta)
        return new

    def derive(self, state: State) -> State:
        """The roots of factors that have seen a gradient."""
        return {**state, **self._roots(state)}

    def _factors(self, state: State, grad: Gradient) -> State:
        G = grad.weight.to(next(iter(state.values())).dtype)
        new = {name: _averaged(state[name], gram, self.beta) for name, gram in grams(state, G).items()}
        return {**new, "count": state["count"] + 1}

    def _roots(self, state: State) -> State:
        made, names = {}, [name for name in ("L", "R") if name in state]
        order = self.order or 2 * len(names)
        for name in names:
            factor = _corrected(state[name], self.beta, state["count"])
            norm = torch.linalg.vector_norm(factor, dim=(-2, -1), keepdim=True)
            eye, usable = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device), norm > 0
            damped = torch.where(usable, factor + self.damping * norm * eye, eye)
            if self.root == "newton":
                root = inverse_root(damped, order, self.newton_steps)
            else:
                values, basis = torch.linalg.eigh(damped)
                root = (basis * values.clamp_min(self.damping * norm[..., 0]) ** (-1 / order)) @ basis.mT
            made[f"{name}_root"] = torch.where(usable, root, state[f"{name}_root"])
        return made

    def sides(self, state: State) -> Sides:
        return Sides(state.get("L_root"), state.get("R_root"))

    def normalize(self, state: State, product: Tensor, moment: Tensor) -> Normalized:
        """In the length of the step of ``magnitude``."""
        if self.magnitude is None:
            return super().normalize(state, product, moment)
        beta = 1.0 if self.magnitude == "adagrad" else self.beta2
        squares = _corrected(state["squares"], beta, state["count"])
        step = moment.to(squares.dtype) / (squares.sqrt() + self.eps)
        wide = product.to(squares.dtype)
        return Normalized(wide * (step.norm() / (wide.norm() + 1e-16)), state)


def inverse_root(matrix_DD: Tensor, order: int, steps: int) -> Tensor:
    """``A^(-1/p)`` of a symmetric positive definite ``[D, D]``, by the coupled Newton iteration (Guo and Higham, 2006):

        ``X <- X Y``,  ``M <- Y^p M``,  ``Y = ((p + 1) I - M) / p``

    from ``X = z^(1/p) I`` and ``M = z A``, ``z = (p + 1) / (2 |A|)``. Along small eigenvalues ``X`` grows to the root from
    below: fewer ``steps`` than it takes are damping.
    """
    z = (order + 1) / (2 * torch.linalg.vector_norm(matrix_DD, dim=(-2, -1), keepdim=True))
    eye = torch.eye(matrix_DD.shape[-1], dtype=matrix_DD.dtype, device=matrix_DD.device)
    X, M, longest = z ** (1 / order) * eye, z * matrix_DD, (1 + 1 / order) * eye
    for _ in range(steps):
        Y = torch.sub(longest, M, alpha=1 / order)
        X, M = X @ Y, torch.linalg.matrix_power(Y, order) @ M
    return (X + X.mT) / 2


def _averaged(old: Tensor, new: Tensor, beta: float) -> Tensor:
    return beta * old + (1 if beta == 1 else 1 - beta) * new


def _corrected(average: Tensor, beta: float, count: Tensor) -> Tensor:
    """Without what an average from zero lacks; a sum as it is."""
    return average if beta == 1 else average / (1 - beta ** count.to(average.dtype)).clamp_min(1e-30)
