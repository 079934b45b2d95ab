"""Second-order optimizers as a compiler pass: MKOR inside torch.compile's own graphs."""

from .api import compile, compile_step
from .distributed import Communication
from .explain import explain
from .ops import op_rule
from .progress import progress
from .rules import MKOR, Rule
from .simulate import simulate

__all__ = ["MKOR", "Communication", "Rule", "compile", "compile_step", "explain", "op_rule", "progress", "simulate"]
