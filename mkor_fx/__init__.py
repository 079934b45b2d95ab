"""Second-order optimizers as a compiler pass: MKOR inside torch.compile's own graphs."""

from . import optim
from .api import compile, compile_step
from .doors.explain import explain
from .doors.simulate import simulate
from .ops import op_rule
from .options import Communication
from .rules import CGFAC, KFAC, MKOR, AdaFisher, Eva, Hybrid, HyLo, Rule, ThermodynamicKFAC
from .show.progress import progress

__all__ = [
    "CGFAC",
    "KFAC",
    "MKOR",
    "AdaFisher",
    "Communication",
    "Eva",
    "HyLo",
    "Hybrid",
    "Rule",
    "ThermodynamicKFAC",
    "compile",
    "compile_step",
    "explain",
    "op_rule",
    "optim",
    "progress",
    "simulate",
]
