"""A SOAP-like rule, as somebody outside of the library would write it: Adam in the eigenbasis of Shampoo's factors.

Moments that move at every step, an orthogonal basis derived every few steps, and directions that are the step itself.
No statistics: it reads the gradient alone (Vyas et al., 2409.11321).
"""

from dataclasses import dataclass

import torch

from mkor_fx.kinds import Kind
from mkor_fx.rules import Gradient, Hyper, Rule


@dataclass(frozen=True, kw_only=True)
class Soap(Rule):
    beta1: Hyper = 0.9
    beta2: Hyper = 0.95
    decay: Hyper = 0.9
    eps: float = 1e-8
    derive_every: int = 2

    applies = "update"
    graft = "rms"
    kinds = {"L": Kind.POSITIVE, "R": Kind.POSITIVE, "Q_L": Kind.ORTHOGONAL, "Q_R": Kind.ORTHOGONAL,  # noqa: RUF012
             "m": Kind.MOMENT, "v": Kind.MOMENT}  # fmt: skip

    def init(self, shape, device):
        zeros = lambda *size: torch.zeros(size, device=device)
        bases = {"Q_L": torch.eye(shape.O, device=device), "Q_R": torch.eye(shape.I, device=device)}
        factors = {"L": zeros(shape.O, shape.O), "R": zeros(shape.I, shape.I)}
        count = torch.zeros((), dtype=torch.int32, device=device)
        return {**factors, **bases, "m": zeros(shape.O, shape.I), "v": zeros(shape.O, shape.I), "count": count}

    def preconditions_bias(self, shape):
        return False

    def summarize(self, shape, a_NI, g_NO):
        return ()

    def unscale(self, summary, scale):
        return summary

    def update(self, state, uses, grad, step):
        return state

    def advance(self, state, grad, step):
        G = grad.weight.to(state["m"].dtype)
        rotated = state["Q_L"].T @ G @ state["Q_R"]
        mix = lambda old, new, weight: weight * old + (1 - weight) * new
        return {**state, "L": mix(state["L"], G @ G.T, self.decay), "R": mix(state["R"], G.T @ G, self.decay),
                "m": mix(state["m"], rotated, self.beta1), "v": mix(state["v"], rotated**2, self.beta2),
                "count": state["count"] + 1}  # fmt: skip

    def derive(self, state):
        turned = {}
        for side, factor in (("Q_L", "L"), ("Q_R", "R")):
            mean = state[factor].diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # no direction is left to rounding
            basis, triangle = torch.linalg.qr(state[factor] @ state[side] + mean * state[side])
            signs = torch.sign(triangle.diagonal(dim1=-2, dim2=-1))  # a basis that does not flip keeps the moments' meaning
            turned[side] = basis * torch.where(signs == 0, torch.ones_like(signs), signs).unsqueeze(-2)
        left, right = (turned[side].mT @ state[side] for side in ("Q_L", "Q_R"))
        return {**state, **turned, "m": left @ state["m"] @ right.mT}

    def precondition(self, state, grad):
        corrected = [1 - beta ** state["count"] for beta in (self.beta1, self.beta2)]
        adam = state["m"] / corrected[0] / ((state["v"] / corrected[1]).sqrt() + self.eps)
        return Gradient((state["Q_L"] @ adam @ state["Q_R"].T).to(grad.weight.dtype), grad.bias)
