"""AdaFisher: a diagonal of Kronecker-factored Fisher information (Martins Gomes et al., ICLR 2025, arXiv 2405.16397)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype, column_square_sum
from .base import Rule, Shape, State, Use
from .direction import Gradient, Graft
from .hyper import Hyper, check_decay, check_positive

#: weights of the old average and of the new statistic, by ``gamma``
_AVERAGES = {"paper": lambda gamma: (gamma, 1 - gamma), "released": lambda gamma: (0.1 * gamma, 0.01 * gamma)}


@dataclass(frozen=True, kw_only=True)
class AdaFisher(Rule):
    """Momentum over a diagonal Fisher information, without a square root.

    ``h`` and ``s`` are averages of the mean squares of the rows of inputs (with a 1 for the bias) and of output gradients
    (of each row's own loss), brought to [0, 1] by ``mm(v) = (v - min v) / (max v - min v + 1e-6)``, from ones:

        ``h <- decay h + (1 - decay) mm(mean_n a^2)``, ``s`` alike; ``m <- momentum m + (1 - momentum) G``
        ``D = m / (1 - momentum^t) / (s h^T + damping)``, ``W <- W (1 - lr wd) - lr D``

    which is AdaFisherW: rate and weight decay are those of the weight's group, and the base optimizer leaves the weight
    alone. With ``momentum=0`` the base optimizer gets ``G / (s h^T + damping)`` in place of the gradient, so SGD with a
    coupled decay gives AdaFisher where the curvature stands still. The published schedule is ``refresh_every=100`` and a
    rate of 1e-3. The smallest entries of ``h`` and ``s`` are 0: their columns and rows take steps of ``lr / damping``.

    State are ``O + I`` numbers a layer and, with momentum, the weight's size; ``O + I`` numbers cross the network a refresh;
    a step costs ``6 O I`` flops. An embedding is left to the base optimizer, as published.

    Args:
        momentum: weight of the old moment, in [0, 1).
        damping: > 0.
        decay: weight of the old average, in [0, 1).
        average: ``"paper"``, as above; ``"released"``: ``h <- 0.1 decay h + 0.01 decay mm``, as in the authors' code, which
            within a few refreshes leaves ``s h^T`` below 1e-4, so that steps are nearly those of momentum alone.
        graft: what sizes a direction; None: nothing, as published.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    momentum: float = 0.9
    damping: Hyper = 1e-3
    decay: Hyper = 0.8
    average: Literal["paper", "released"] = "paper"
    graft: Graft | None = None

    joint_bias = True
    kinds = dict.fromkeys(("h", "s", "momentum", "bias_momentum"), Kind.MOMENT)

    def __post_init__(self) -> None:
        check_positive(self, "damping", "1e-3")
        check_decay(self, "0.8")
        if not isinstance(self.momentum, (int, float)) or not 0 <= self.momentum < 1:
            raise ValueError(f"AdaFisher(momentum={self.momentum!r}): must be a number in [0, 1), e.g. 0.9")
        if self.average not in _AVERAGES:
            raise ValueError(f"AdaFisher(average={self.average!r}): must be 'paper' or 'released'")

    @property
    def applies(self) -> Literal["gradient", "update"]:  # type: ignore[override]
        return "update" if self.momentum else "gradient"

    def overrides(self, function: str) -> bool:
        return super().overrides(function) and (function != "advance" or bool(self.momentum))

    def without_state(self, shape: Shape) -> str:
        return "it is an embedding, which AdaFisher leaves to the base optimizer"

    def init(self, shape: Shape, device: torch.device) -> State:
        """``h`` ``[I]``, one more with a bias, and ``s`` ``[O]``, ones; with momentum the moments, zero, and the number of
        ``steps``. Float32."""
        if shape.lookup:
            return {}
        state = {"h": torch.ones(shape.I + shape.bias, device=device), "s": torch.ones(shape.O, device=device)}
        if self.momentum:
            state["momentum"] = torch.zeros(shape.O, shape.I, device=device)
            state["steps"] = torch.zeros((), dtype=torch.int64, device=device)
        if self.momentum and shape.bias:
            state["bias_momentum"] = torch.zeros(shape.O, device=device)
        return state

    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        return column_square_sum(a_NI), column_square_sum(g_NO)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = summary
        return inputs, outputs / (scale * scale)

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        along_I, along_O = torch.zeros_like(state["h"]), torch.zeros_like(state["s"])
        for use in uses:
            inputs, outputs = use.summary[0] / use.rows.clamp_min(1), use.summary[1] * use.rows
            of_I, of_O = (outputs, inputs) if use.opposite else (inputs, outputs)
            if len(of_I) < len(along_I):  # the input of a bias, which the opposite use does not have
                of_I = torch.nn.functional.pad(of_I, (0, 1), value=0.0 if use.opposite else 1.0)
            along_I, along_O = along_I + of_I.to(along_I.dtype), along_O + of_O.to(along_O.dtype)
        old, new = _AVERAGES[self.average](self.decay)
        means = {"h": along_I / len(uses), "s": along_O / len(uses)}
        return {**state, **{name: old * state[name] + new * spread(mean) for name, mean in means.items()}}

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        if not self.momentum:
            return state
        mix: Any = lambda old, new: self.momentum * old + (1 - self.momentum) * new.to(old.dtype)
        moments = {"momentum": mix(state["momentum"], grad.weight), "steps": state["steps"] + 1}
        if grad.bias is not None:
            moments["bias_momentum"] = mix(state["bias_momentum"], grad.bias)
        return {**state, **moments}

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        dtype, moment = accumulation_dtype(grad.weight.dtype), grad
        if self.momentum:
            share = (1 - self.momentum ** state["steps"]).to(dtype)
            bias = None if grad.bias is None else state["bias_momentum"].to(dtype) / share
            moment = Gradient(state["momentum"].to(dtype) / share, bias)
        G, b = moment.to(dtype)
        h, s = state["h"].to(dtype), state["s"].to(dtype)
        weight = G / (torch.outer(s, h[: G.shape[1]]) + self.damping)
        return Gradient(weight, None if b is None else b / (s * h[-1] + self.damping)).to(grad.weight.dtype)


def spread(mean: Tensor) -> Tensor:
    """A vector brought to [0, 1] by its extremes; one whose entries are alike is 0."""
    low, high = mean.amin(), mean.amax()
    return (mean - low) / (high - low + 1e-6)
