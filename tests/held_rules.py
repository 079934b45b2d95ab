"""The rules that the contract test holds, one entry a kind of rule."""

from dataclasses import dataclass

import torch
from soap import Soap

from mkor_fx import (
    CGFAC,
    EKFAC,
    KFAC,
    KLDWRM,
    MKOR,
    SINGD,
    SOAP,
    AdaFisher,
    Eva,
    HyLo,
    Rule,
    Shampoo,
    ThermodynamicKFAC,
)
from mkor_fx.kinds import Kind
from mkor_fx.rules import Gradient, Sides


@dataclass(frozen=True, kw_only=True)
class Leading(Rule):
    """Everything that the contract adds, at once: statistics that read the state, a momentum that the sides multiply, an
    own size, an own dtype of products, and directions that are the step itself, of biases as well."""

    mu: float = 0.8

    reads_state = True
    graft = "rms"
    applies = "update"
    product_dtype = torch.float32
    kinds = {"L": Kind.POSITIVE, "B": Kind.MOMENT, "b": Kind.MOMENT}  # noqa: RUF012

    def init(self, shape, device):
        state = {"L": torch.eye(shape.O, device=device), "B": torch.zeros(shape.O, shape.I, device=device)}
        return state | ({"b": torch.zeros(shape.O, device=device)} if shape.bias else {})

    def summarize(self, shape, a_NI, g_NO, state):
        share = 1 / state["L"].diagonal().sum()
        return share * (a_NI.T @ a_NI), share * (g_NO.T @ g_NO)

    def unscale(self, summary, scale):
        return summary[0], summary[1] / scale**2

    def update(self, state, uses, grad, step):
        moment = sum(use.summary[0 if use.opposite else 1] for use in uses)
        return {**state, "L": 0.9 * state["L"] + 0.1 * moment.to(state["L"].dtype)}

    def advance(self, state, grad, step):
        mix = lambda old, new: self.mu * old + (1 - self.mu) * new.to(old.dtype)
        return {**state, "B": mix(state["B"], grad.weight)} | (
            {"b": mix(state["b"], grad.bias)} if grad.bias is not None else {})  # fmt: skip

    def moment(self, state, grad):
        return Gradient(state["B"].to(grad.weight.dtype), None if grad.bias is None else state["b"].to(grad.bias.dtype))

    def sides(self, state):
        return Sides(state["L"], None)


#: held in every run
RULES = {
    "mkor": MKOR(factor_dtype=torch.float64, rank=3),
    "mkor, sums": MKOR(factor_dtype=torch.float64, statistic="mean+rows+gradient", bias="left"),
    "mkor, published": MKOR.published(factor_dtype=torch.float64),
    "mkor, gradient": MKOR.published(factor_dtype=torch.float64, statistic="mean+gradient", form="forgetful"),
    "eva": Eva(decay=0.9, damping=0.5, outputs="sum", graft=None),
    "kfac": KFAC(derive_every=2, damping=1e-2),
    "kfac, eigen": KFAC(inverse="eigen", derive_every=2, damping=1e-2),
    "kfac, newton": KFAC(inverse="newton", damping=1e-1),
    "soap": Soap(),
    "leading": Leading(),
}

#: one of each kind: of these, what is expensive or no matter of the rule's own is held in every run, of others nightly
KINDS = ("mkor", "mkor, gradient", "eva", "kfac", "soap", "leading")

#: of these a door's trajectory and one resume in every run, the rest nightly
MORE_RULES: dict[str, Rule] = {
    "adafisher": AdaFisher(damping=0.1),
    "adafisher, gradient": AdaFisher(momentum=0.0, damping=0.1),
    "cgfac": CGFAC(damping=1e-2, iterations=4),
    "cgfac, sketches": CGFAC(curvature="sketches", rank=5, damping=1e-2, iterations=4, warm_start=False),
    "thermodynamic": ThermodynamicKFAC(damping=0.1, derive_every=2, steps=20, burn_in=5, bits=12, rounding="stochastic"),
    "singd": SINGD(beta1=0.1, damping=1e-2),
    "singd, diagonal": SINGD(beta1=0.1, structure="diagonal", form="ikfac", alpha1=0, graft=None),
    "singd, triangular": SINGD(beta1=0.1, structure=("triangular", "block"), block=3),
    "singd, hierarchical": SINGD(beta1=0.1, structure=("rank1", "hierarchical"), corners=(2, 2)),
    "kldwrm": KLDWRM(damping=0.1, derive_every=2, kl_clip=None),
    "kldwrm, q": KLDWRM(variant="q", rate=0.05, damping=0.1, derive_every=2, kl_clip=None),
    "kldwrm, cholesky": KLDWRM(variant="q", rate=0.05, damping=0.1, derive_every=2, inverse="cholesky", kl_clip=None),
    "kldwrm, newton": KLDWRM(variant="q", rate=0.05, damping=0.1, inverse="newton", kl_clip=None),
    "shampoo": Shampoo(derive_every=2, beta=0.9, damping=1e-3),
    "shampoo, newton": Shampoo(root="newton", damping=1e-3, graft=None, magnitude="rmsprop", beta2=0.9),
    "SOAP": SOAP(derive_every=2, max_factor=6),  # sides that a first gradient fills, or bases are a matter of rounding
    "ekfac": EKFAC(derive_every=2, damping=1e-2, scaling_decay=0.8),
    "ekfac, gradient": EKFAC(scaling="gradient", scaling_decay=0.75, derive_every=2, damping=1e-2),
    "hylo": HyLo(rows=4, ranks=2, damping=0.5, graft=None),
    "hylo, interpolated": HyLo(method="kid", rows=4, ranks=2, damping=0.5, graft=None),
}

#: why the backward mode does not take one
REFUSED = {
    **dict.fromkeys(("mkor", "soap", "leading", "adafisher", "shampoo", "SOAP"), "keeps moments"),
    **dict.fromkeys((name for name in MORE_RULES if name.startswith(("cgfac", "kldwrm"))), "keeps moments"),
    **dict.fromkeys(("mkor, sums", "mkor, gradient", "shampoo, newton", "ekfac, gradient"), "reads the gradient"),
}

#: as they would be taken in half precision
HALF = {
    "mkor": MKOR(factor_dtype=torch.bfloat16),
    "mkor, published": MKOR.published(factor_dtype=torch.bfloat16),
    "eva": Eva(),
    "adafisher": AdaFisher(damping=1e-2),
    "cgfac": CGFAC(),
    "thermodynamic": ThermodynamicKFAC(steps=20, burn_in=10),
    "hylo": HyLo(rows=4),
    "kfac": KFAC(),
    "kfac, eigen": KFAC(inverse="eigen"),
    "kfac, newton": KFAC(inverse="newton"),
    "singd": SINGD(factor_dtype=torch.bfloat16),
    "singd, hierarchical": SINGD(factor_dtype=torch.bfloat16, structure="hierarchical", corners=(2, 2)),
    "kldwrm": KLDWRM(decay=0.5, graft="gradient", kl_clip=None),
    "shampoo": Shampoo(),
    "shampoo, newton": Shampoo(root="newton"),
    "SOAP": SOAP(),
    "ekfac": EKFAC(),
    "ekfac, gradient": EKFAC(scaling="gradient"),
}
