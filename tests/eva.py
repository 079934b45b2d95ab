"""Eva, as somebody outside of the library would write it: averages of two vectors, a direction that is no product of sides.

``D = (G - (g^T G a) / (damping + |a|^2 |g|^2) g a^T) / damping`` (Zhang et al., ICLR 2023), sized by the gradient.
"""

from dataclasses import dataclass

import torch

from mkor_fx.kinds import Kind
from mkor_fx.rules import Gradient, Hyper, Rule


@dataclass(frozen=True, kw_only=True)
class Eva(Rule):
    decay: Hyper = 0.9
    damping: Hyper = 0.5
    graft: str | None = "gradient"

    kinds = {"a": Kind.MOMENT, "g": Kind.MOMENT}  # noqa: RUF012

    def init(self, shape, device):
        return {"a": torch.zeros(shape.I, device=device), "g": torch.zeros(shape.O, device=device)}

    def summarize(self, shape, a_NI, g_NO):
        return a_NI.sum(0), g_NO.sum(0)

    def unscale(self, summary, scale):
        return summary[0], summary[1] / scale

    def update(self, state, uses, grad, step):
        pairs = [(use.summary[0] / use.rows.clamp_min(1), use.summary[1]) for use in uses]
        along = [(g, a) if not use.opposite else (a, g) for use, (a, g) in zip(uses, pairs, strict=True)]
        average = lambda key, new: self.decay * state[key] + (1 - self.decay) * (sum(new) / len(new)).to(state[key].dtype)
        return {"a": average("a", [a for _, a in along]), "g": average("g", [g for g, _ in along])}

    def precondition(self, state, grad):
        a_I, g_O = (state[key].to(grad.weight.dtype) for key in ("a", "g"))
        along = g_O @ grad.weight @ a_I / (self.damping + a_I.dot(a_I) * g_O.dot(g_O))
        return Gradient((grad.weight - along * torch.outer(g_O, a_I)) / self.damping, grad.bias)
