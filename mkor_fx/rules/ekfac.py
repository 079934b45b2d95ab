"""EKFAC: K-FAC's bases with second moments of their own (George et al., 2018, arXiv 1806.03884)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype
from .base import Shape, State, Use
from .bases import into_bases
from .direction import Gradient
from .hyper import Hyper, check_decay
from .kfac import KFAC


@dataclass(frozen=True, kw_only=True)
class EKFAC(KFAC):
    """The eigenbases of :class:`KFAC`'s factors, in which the curvature is measured in the place of products of eigenvalues.

    With rows ``a`` of inputs and ``g`` of output gradients, ``N`` of them (``g`` carries ``1/N``), and ``Q_L``, ``Q_R`` the
    eigenvectors of the averaged ``L`` and ``R``:

        ``S = N ((g Q_L)^2)^T ((a Q_R)^2)``, squares of entries, ``[O, I]``
        ``D = Q_L [(Q_L^T G Q_R) / (S + damping)] Q_R^T``

    ``S`` is the mean square of the rows' own gradients: the diagonal that is nearest to the empirical Fisher matrix in these
    bases, where K-FAC's is a product, ``q_L q_R^T``. It is averaged at each refresh, in the bases of the step, and set to
    that product when these change. A bias is a weight of one input that is always 1. Rows are those of K-FAC: of
    sequences and convolutions each position is one.

    What crosses the network is ``I^2 + O^2 + O I`` numbers a layer; with ``scaling="gradient"`` K-FAC's ``I^2 + O^2``.

    Args:
        scaling: what ``S`` is measured by. ``"rows"``: as above; the statistics read the state. ``"gradient"``: by
            ``N (Q_L^T G Q_R)^2`` of the mean gradient, which is ``S`` for rows that are independent and zero on average; for
            layers that are no lookups, whose rows differ by what they look up.
        scaling_decay: weight of the old ``S``, in [0, 1); published for ``"gradient"``: 0.75.
        damping, decay, derive_every, graft, kl_clip, max_factor: of :class:`KFAC`; a side without a factor counts as 1.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    scaling: Literal["rows", "gradient"] = "rows"
    scaling_decay: Hyper = 0.95

    inverse: Literal["eigen"] = field(default="eigen", init=False, repr=False)
    pi: bool = field(default=False, init=False, repr=False)
    newton_steps: int = field(default=1, init=False, repr=False)

    kinds = {**KFAC.kinds, "scaling": Kind.MOMENT, "bias_scaling": Kind.MOMENT}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self, "0.95", "scaling_decay")
        if self.scaling not in ("rows", "gradient"):
            raise ValueError(f"EKFAC(scaling={self.scaling!r}): must be 'rows' or 'gradient'")

    @property
    def reads_state(self) -> bool:  # type: ignore[override]
        return self.scaling == "rows"

    @property
    def reads_gradient(self) -> bool:  # type: ignore[override]
        return self.scaling == "gradient"

    def without_state(self, shape: Shape) -> str:
        if self.scaling == "gradient" and shape.lookup:
            return "scaling='gradient' is of the sum over rows, of which those of a lookup are apart: use scaling='rows'"
        return super().without_state(shape)

    def init(self, shape: Shape, device: torch.device) -> State:
        """K-FAC's state; ``scaling`` ``[O, I]``, 1 in the place of a side without a factor, and ``bias_scaling`` ``[O]``,
        zero, float32."""
        state = {} if self.scaling == "gradient" and shape.lookup else super().init(shape, device)
        if not state:
            return {}
        sizes = [state[f"{name}_values"].numel() if name in state else 1 for name in ("L", "R")]
        state["scaling"] = torch.zeros(sizes, device=device)
        if shape.bias and "L" in state:
            state["bias_scaling"] = torch.zeros(shape.O, device=device)
        return state

    def summarize(  # type: ignore[override]
        self, shape: Shape, a_NI: Tensor, g_NO: Tensor, state: State | None = None
    ) -> tuple[Tensor, ...]:
        """K-FAC's two products; of rows ``sum (g Q_L)^2 (a Q_R)^2``, ``[O, I]`` as the weight lies, of a bias ``[O]``."""
        products = super().summarize(shape, a_NI, g_NO)
        if state is None:
            return products
        along_O, along_I = (a_NI, g_NO) if shape.opposite else (g_NO, a_NI)
        left, right = (_squares(state.get(f"{n}_basis"), rows) for n, rows in (("L", along_O), ("R", along_I)))
        bias = (left.sum(0),) if shape.bias and "L_basis" in state else ()
        return (*products, left.mT @ right, *bias)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        """Squares of ``g`` are quadratic in the scale; where ``g`` has no factor they are not in the sums."""
        inputs, outputs, *squares = summary
        factor = scale * scale if outputs.numel() else torch.ones_like(scale)
        return (*super().unscale((inputs, outputs), scale), *(square / factor for square in squares))

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        new = super().update(state, uses, grad, step)
        measured = self._of_gradient(state, uses, grad) if self.scaling == "gradient" else _of_rows(state, uses)
        old = self.scaling_decay
        for name, squares in measured.items():
            new[name] = old * state[name] + (1 - old) * squares.to(state[name].dtype)
        return new

    def _of_gradient(self, state: State, uses: list[Use], grad: Gradient) -> dict[str, Tensor]:
        """``N (Q_L^T G Q_R)^2``, the mean over a side without a factor."""
        rows = sum((use.rows for use in uses[1:]), uses[0].rows) / len(uses)
        wide = grad.to(state["scaling"].dtype)
        squares = rows * into_bases(state, wide.weight).square()
        without = [axis for axis, name in enumerate(("L", "R")) if name not in state]
        found = {"scaling": squares.mean(without, keepdim=True) if without else squares}
        if wide.bias is not None and "bias_scaling" in state:
            found["bias_scaling"] = rows * (state["L_basis"].mT @ wide.bias).square()
        return found

    def derive(self, state: State) -> State:
        """New bases, in which the curvature is K-FAC's until it has been measured."""
        new = super().derive(state)
        weight, bias = super().curvature(new)
        return {**new, "scaling": weight, **({"bias_scaling": bias} if "bias_scaling" in state else {})}

    def curvature(self, state: State) -> tuple[Tensor, Tensor]:
        """Of what stands in the bases: ``S``, ``[O, I]``, and that of a bias, ``[O]``."""
        return state["scaling"], state.get("bias_scaling", super().curvature(state)[1])


def _squares(basis: Tensor | None, rows_NM: Tensor) -> Tensor:
    """``(rows Q)^2``, ``[N, M]``; 1, ``[N, 1]``, of a side without a basis."""
    if basis is None:
        return rows_NM.new_ones(rows_NM.shape[0], 1, dtype=accumulation_dtype(rows_NM.dtype))
    dtype = accumulation_dtype(rows_NM.dtype)
    return (rows_NM.to(dtype) @ basis.to(dtype)).square()


def _of_rows(state: State, uses: list[Use]) -> dict[str, Tensor]:
    """The mean squares of the rows' own gradients, whose ``g`` are ``N`` times as long as those of the sums."""
    found: dict[str, Tensor] = {}
    for use in uses:
        rows = use.rows.clamp_min(1)
        outputs = "R" if use.opposite else "L"
        factor = (rows if outputs in state else 1 / rows) / len(uses)
        squares = dict(zip(("scaling", "bias_scaling"), use.summary[2:]))
        for name, square in squares.items():
            found[name] = found.get(name, 0) + factor * square
    return found
