"""Eva: curvature from mean vectors alone (Zhang, Shi and Li, ICLR 2023; extended as arXiv 2308.02123)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype, column_sum
from .base import Rule, Shape, State, Use
from .direction import Gradient, Graft
from .hyper import Hyper, check_decay, check_kl_clip, check_positive, weight_of_old


@dataclass(frozen=True, kw_only=True)
class Eva(Rule):
    """The exact inverse of a damped rank-one curvature, of vectors in place of matrices.

    ``a`` and ``g`` are averages of the mean row of inputs (with a 1 for the bias) and of the mean, or the sum, of the rows
    of output gradients (which carry ``1/N``), each ``x <- decay x + (1 - decay) x_new`` with the first taken as it is:

        ``D = (G - (g^T G a) / (damping + |a|^2 |g|^2) g a^T) / damping``

    that is ``(vec(g a^T) vec(g a^T)^T + damping)^-1 vec(G)``. State and what crosses the network are ``O + I`` numbers a
    layer, a direction costs ``4 O I`` flops.

    Args:
        decay: weight of the old average, in [0, 1); the published code forgets nearly all of it.
        damping: > 0.
        outputs: ``"mean"``, as published: at usual batches ``|g|`` is so small that ``D`` is nearly ``G / damping``;
            ``"sum"``: ``g`` is the gradient of a bias.
        graft: what sizes a direction; ``"gradient"`` stands in for Eva's clip of the KL divergence, layer by layer.
        kl_clip: that clip itself, with ``graft=None``, see :class:`KFAC`; published: 1e-3.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    decay: Hyper = 0.05
    damping: Hyper = 0.03
    outputs: Literal["mean", "sum"] = "mean"
    graft: Graft | None = "gradient"
    kl_clip: Hyper | None = None

    joint_bias = True
    kinds = {"a": Kind.MOMENT, "g": Kind.MOMENT}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_positive(self, "damping", "0.03")
        check_decay(self, "0.05")
        if self.outputs not in ("mean", "sum"):
            raise ValueError(f"Eva(outputs={self.outputs!r}): must be 'mean' or 'sum'")
        check_kl_clip(self)

    def init(self, shape: Shape, device: torch.device) -> State:
        """``a`` ``[I]`` and ``g`` ``[O]``, zero, float32; ``seen`` counts refreshes."""
        sizes = {"a": (shape.I,), "g": (shape.O,), "seen": ()}
        return {name: torch.zeros(size, device=device) for name, size in sizes.items()}

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        return column_sum(a_NI), column_sum(g_NO)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = summary
        return inputs, outputs / scale

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        new = {"a": torch.zeros_like(state["a"]), "g": torch.zeros_like(state["g"])}
        for use in uses:
            rows = use.rows.clamp_min(1)
            inputs, outputs = use.summary[0] / rows, use.summary[1] / (rows if self.outputs == "mean" else 1)
            new["a"] = new["a"] + (outputs if use.opposite else inputs).to(new["a"].dtype) / len(uses)
            new["g"] = new["g"] + (inputs if use.opposite else outputs).to(new["g"].dtype) / len(uses)
        old = weight_of_old(state["seen"], self.decay)
        averaged = {name: old * state[name] + (1 - old) * new[name] for name in new}
        return {**averaged, "seen": state["seen"] + 1}

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        dtype = accumulation_dtype(grad.weight.dtype)  # in float16 lengths overflow
        G, b = grad.to(dtype)
        a_I, g_O = (state[name].to(dtype) for name in ("a", "g"))
        along, length = g_O @ G @ a_I, a_I.dot(a_I)
        if b is not None:
            along, length = along + g_O.dot(b), length + 1
        share = along / (self.damping + length * g_O.dot(g_O))
        weight = (G - share * torch.outer(g_O, a_I)) / self.damping
        return Gradient(weight, None if b is None else (b - share * g_O) / self.damping).to(grad.weight.dtype)
