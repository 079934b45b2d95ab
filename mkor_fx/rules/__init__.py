"""Update rules, one file each."""

from .base import Gradient, Rule, Shape, State, Use
from .mkor import MKOR

__all__ = ["MKOR", "Gradient", "Rule", "Shape", "State", "Use"]
