"""MKOR: low-rank updates of inverse Kronecker factors (Mozaffari et al., NeurIPS 2023, arXiv 2306.01685, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype
from . import inverse_updates
from .base import Shape, State, Use
from .direction import Gradient, Sides, joined
from .hybrid import Hybrid
from .mkor_options import PUBLISHED
from .mkor_statistics import MKORStatistics


@dataclass(frozen=True, kw_only=True)
class MKOR(MKORStatistics):
    """Momentum-enabled Kronecker-factor optimizer: inverse factors by low-rank steps.

    For a weight ``W`` of ``[O, I]`` on rows ``a`` of inputs and ``g`` of output gradients, the inverse factors ``L`` of
    ``[O, O]`` and ``R`` of ``[I, I]`` take a step of low rank each. The default form, with momentum ``mu`` and ``G`` the
    gradient:

        ``B <- mu B + G``, ``M = G + mu B``, ``D = L M R / sqrt(r c)``, ``W <- W (1 - lr wd) - lr s sqrt(O I) / |D| D``

    with ``r`` and ``c`` the moving averages of the mean squares of the rows and columns of ``L M R``. A step gains to first
    order what Adam's would: ``s = max(0.2, min(|m| / (sqrt(v) cos), 0.03 |W| / (lr sqrt(O I))))`` with ``m`` and ``v`` the
    averages of ``G`` and of ``|G|^2``, and ``cos`` that of ``D`` and ``M``, at least 1/8. It has Adam's rate and weight
    decay, and the base optimizer leaves the weight alone. With
    ``momentum=0`` the base optimizer gets ``L G R |G| / |L G R|`` in place of the gradient; the forms of :meth:`published`
    are meant for that.

    Fields of type ``Hyper`` may change over time: a number, a 0-dim tensor, or a function of the step.

    Args:
        form: how an inverse factor ``F`` takes statistics.

            - ``"damped"`` (default): ``F`` is the inverse of ``S <- gamma S + (1-gamma) (I + kappa d C / tr C)``, with
              ``d`` the width of the side and ``C`` the mean of the statistics' ``v v^T``: K-FAC's factor with damping
              relative to its mean eigenvalue, whatever its scale. Always positive definite. The identity is added as a
              few unit vectors a step, coordinates in turn.
            - ``"scale_free"``: ``forgetful`` on ``v * sqrt(kappa) / |v|``. Keeps
              ``(1-gamma) / (1 + kappa (1-gamma)) <= F <= 1`` whatever the scale of loss, activations or loss scaler.
            - ``"forgetful"``: ``B = gamma F + (1-gamma) I``, then ``B - B v (B v)^T / (1 + v^T B v)``: what the
              released code computes.
            - ``"exact"``: the inverse of ``gamma L + (1-gamma) v v^T``. Unseen directions grow as ``gamma^-t``, so it
              needs the stabiliser.
            - ``"paper"``: ``gamma F + (1-gamma) / (gamma^2 (1 + gamma (1-gamma) v^T F v)) F v (F v)^T``, as printed. It
              amplifies the direction it has seen; offered for comparison.
        statistic: ``"rows"``: ``rank`` random-sign sketches ``g^T w`` and ``a^T w'`` of the rows, unbiased for ``g^T g``
            and ``a^T a``; ``"mean"``: ``sum_n g[n]`` and ``mean_n a[n]``; ``"gradient"``: ``rank`` sketches ``G w`` and
            ``G^T w'``, unbiased for ``G G^T`` and ``G^T G``, which need no capture and no traffic; or sums of them, as
            ``"mean+gradient"``, of equal weight. None is ``"rows"``; of the published forms, which have no rows, ``"mean"``.
        rank: sketches a side and step, of ``"rows"`` and ``"gradient"``; None is 8, and 1 for the published forms.
        momentum: ``mu``, in [0, 1); 0 hands a direction to the base optimizer. None is 0.9, and 0 for the published forms.
        nesterov: ``M = G + mu B``, else ``M = B``.
        beta2: decay of ``r``, ``c`` and ``v``, in [0, 1); 0: ``D = L M R`` and ``s = 0.2``. None is 0.95, and 0 without
            momentum and for the published forms.
        gamma: factor momentum, in (0, 1). None is 0.95, and 0.99 for the published forms.
        kappa: what statistics weigh beside the identity, > 0: for ``damped`` the damping is ``1 / kappa`` of the mean
            eigenvalue, for ``scale_free`` it is the squared length to which every statistic is brought. None is 3, and 10
            for the published forms.
        epsilon, zeta: norm-based stabiliser of the published forms: where ``max |F| > epsilon``,
            ``F <- zeta F + (1 - zeta) I`` before the update. ``zeta < gamma``; None is ``gamma / 2``. ``epsilon=None`` is
            1000 for ``exact`` and ``paper`` and infinite (off) for the others, which are bounded by construction.
        rescale: without momentum, give each direction the norm of its raw gradient.
        bias: ``"left"``: ``L @ grad`` with its own norms; ``"joint"``: one more column of ``[W | b]`` (published forms);
            ``"off"``: left to the base optimizer. None is ``"off"``, and ``"left"`` for the published forms.
        clamp: bound on the entries of every row of ``a`` and ``g`` before they are summed, or None.
        max_factor: a side larger than this stays the identity.
        factor_dtype: float32, bfloat16, float16 or float64. The arithmetic of the update is float32 (float64 for
            float64 factors).
        product_dtype: of the two products with the factors; None is that of the gradient. ``"fast"`` (default) is bfloat16
            for float32 gradients, as in Muon, where the device multiplies it natively; the published forms take it for None.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    @classmethod
    def published(cls, form: str = "scale_free", **options: Any) -> MKOR:
        """MKOR as it was published, with one statistic a step and the base optimizer behind it; ``form`` says how it takes
        the statistic: ``scale_free``, ``forgetful``, ``exact`` or ``paper``."""
        if form not in PUBLISHED:
            raise ValueError(f"MKOR.published(form={form!r}): must be one of {', '.join(PUBLISHED)}")
        return cls(form=form, **options)  # type: ignore[arg-type]

    @classmethod
    def hybrid(cls, **options: Any) -> Hybrid:
        """MKOR-H: ``MKOR(**options)`` that gives way to the base optimizer where it no longer pays, see :class:`Hybrid`."""
        return Hybrid(cls(**options))

    def without_state(self, shape: Shape) -> str:
        if shape.lookup and self.keeps_momentum:
            return "it is an embedding, which this form leaves to the base optimizer"
        return f"both sides exceed max_factor={self.max_factor}"

    kinds = {  # noqa: RUF012
        **{"L": Kind.POSITIVE, "R": Kind.POSITIVE},
        **dict.fromkeys(("momentum", "row_squares", "column_squares", "square"), Kind.MOMENT),
    }

    def init(self, shape: Shape, device: torch.device) -> State:
        """``{"L": eye(O), "R": eye(I)}`` in ``factor_dtype``, sides above ``max_factor`` left out; with momentum the sums
        ``momentum`` and ``bias_momentum``; for ``damped`` the number of ``visits``.

        The vocabulary of an embedding is a side that is left out, too: the second moment of one-hots is diagonal, which
        base optimizers with a scale an element take care of, while a full factor would move rows that no token has used.
        With momentum all of an embedding is left to them: its rows are seldom seen, and would go on moving.
        """
        if shape.lookup and self.keeps_momentum:
            return {}
        inputs = shape.I + (shape.bias and self.bias == "joint")
        sides = {"L": shape.O} if shape.lookup else {"L": shape.O, "R": inputs}
        state = {
            name: torch.eye(size, dtype=self.factor_dtype, device=device)
            for name, size in sides.items()
            if size <= self.max_factor
        }
        if not state:
            return {}
        dtype = accumulation_dtype(self.factor_dtype)
        if self.form == "damped":
            state["visits"] = torch.zeros((), dtype=torch.int64, device=device)
        if self.keeps_momentum:
            state["momentum"] = torch.zeros(shape.O, shape.I, dtype=dtype, device=device)
        if self.beta2:
            state["row_squares"] = torch.zeros(shape.O, dtype=dtype, device=device)
            state["column_squares"] = torch.zeros(shape.I, dtype=dtype, device=device)
            state["square"] = torch.zeros((), dtype=dtype, device=device)
            state["steps"] = torch.zeros((), dtype=torch.int64, device=device)
        if self.keeps_momentum and shape.bias and self.bias != "off":
            state["bias_momentum"] = torch.zeros(shape.O, dtype=dtype, device=device)
        return state

    def preconditions_bias(self, shape: Shape) -> bool:
        return self.bias == "joint" or (self.bias == "left" and shape.O <= self.max_factor)

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        left, right = list[Tensor](), list[Tensor]()
        joint = grad.bias is not None and self.bias == "joint"
        for use in uses:
            for of_inputs, of_outputs in self.statistics_of(use):
                along_O, along_I = (of_inputs, of_outputs) if use.opposite else (of_outputs, of_inputs)
                if joint:  # the bias is a column whose input is always 1, and which the opposite use does not have
                    along_I = torch.nn.functional.pad(along_I, (0, 1), value=0.0 if use.opposite else 1.0)
                left.append(along_O)
                right.append(along_I)
        if self.reads_gradient:
            of_outputs, of_inputs = self.gradient_sketches(joined(grad) if joint else grad.weight, step)
            left.append(of_outputs)
            right.append(of_inputs)
        dtype = accumulation_dtype(self.factor_dtype)
        blocks = {"L": [v.to(dtype) for v in left], "R": [v.to(dtype) for v in right]}
        new = {name: self._refresh(state, name, blocks[name]) for name in blocks if name in state}
        return {**state, **new, **({"visits": state["visits"] + 1} if "visits" in state else {})}

    # ---- factors ------------------------------------------------------------------------------------------------------

    def _refresh(self, state: State, name: str, blocks: list[Tensor]) -> Tensor:
        factor_DD = state[name]
        if self.form == "damped":
            return self._damped(factor_DD, blocks, state["visits"])
        vectors = [block[0] for block in blocks]
        share, factor = 1 / len(vectors), factor_DD
        if isinstance(self.stabiliser_threshold, Tensor) or self.stabiliser_threshold < math.inf:
            factor = inverse_updates.stabilised(factor_DD.to(vectors[0].dtype), self.stabiliser_threshold, self.pull)
        if self.form == "scale_free":
            scale_by = inverse_updates.scale_to_by if isinstance(self.kappa, Tensor) else inverse_updates.scale_to
            vectors = [scale_by(v, self.kappa) for v in vectors]
        if self.form == "paper":
            return inverse_updates.as_printed(factor.to(vectors[0].dtype), vectors, self.gamma).to(factor_DD.dtype)
        if self.form == "exact":
            scale, shift, weight = 1 / self.gamma, 0.0, (1 - self.gamma) * share
        else:
            scale, shift, weight = self.gamma, 1 - self.gamma, share
        if isinstance(self.gamma, Tensor):
            numbers = [x if isinstance(x, Tensor) else self.gamma.new_full((), x) for x in (scale, shift, weight)]
            return inverse_updates.inverse_update_by(factor, vectors, *numbers).to(factor_DD.dtype)
        return inverse_updates.inverse_update(factor, vectors, scale, shift, weight).to(factor_DD.dtype)

    def _damped(self, factor_DD: Tensor, blocks: list[Tensor], visits: Tensor) -> Tensor:
        numbers, probes = (self.gamma, self.kappa), self.probes(factor_DD.shape[-1])
        if any(isinstance(x, Tensor) for x in numbers):
            tensors = [x if isinstance(x, Tensor) else blocks[0].new_full((), x) for x in numbers]
            return inverse_updates.damped_update_by(factor_DD, blocks, visits, *tensors, probes)
        return inverse_updates.damped_update(factor_DD, blocks, visits, *numbers, probes)

    # ---- directions ---------------------------------------------------------------------------------------------------

    def sides(self, state: State) -> Sides:
        return Sides(state.get("L"), state.get("R"))
