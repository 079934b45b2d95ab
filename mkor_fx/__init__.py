"""Second-order optimizers as a compiler pass: MKOR inside torch.compile's own graphs."""

from . import nn, optim
from .api import compile, compile_step
from .doors.explain import explain
from .doors.simulate import simulate
from .ops import op_rule
from .options import Communication
from .rules import (
    CGFAC,
    EKFAC,
    KFAC,
    KLDWRM,
    MKOR,
    SINGD,
    SOAP,
    AdaFisher,
    Eva,
    Hybrid,
    HyLo,
    Rule,
    Shampoo,
    ThermodynamicKFAC,
)
from .show.progress import progress

__all__ = [
    "CGFAC",
    "EKFAC",
    "KFAC",
    "KLDWRM",
    "MKOR",
    "SINGD",
    "SOAP",
    "AdaFisher",
    "Communication",
    "Eva",
    "HyLo",
    "Hybrid",
    "Rule",
    "Shampoo",
    "ThermodynamicKFAC",
    "compile",
    "compile_step",
    "explain",
    "nn",
    "op_rule",
    "optim",
    "progress",
    "simulate",
]
