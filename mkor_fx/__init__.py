"""Second-order optimizers as a compiler pass: MKOR inside torch.compile's own graphs."""

from typing import TYPE_CHECKING, NoReturn

from . import nn, optim
from .api import compile, compile_step
from .doors.explain import explain
from .doors.simulate import simulate
from .ops import op_rule
from .options import Communication
from .passes.order.compression import Compression
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
from .rules.choice import NO_RULES
from .runtime.speeds import Speeds
from .show.bubbles import Pipeline
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
    "Compression",
    "Eva",
    "HyLo",
    "Hybrid",
    "Pipeline",
    "Rule",
    "Shampoo",
    "Speeds",
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

if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str) -> NoReturn:
        """Of what is not there, maybe why."""
        why = f": {NO_RULES[name]}" if name in NO_RULES else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{why}")
