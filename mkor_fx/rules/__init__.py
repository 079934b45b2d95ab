"""Update rules, one file each."""

from ..kinds import Kind
from .base import Rule, Shape, State, Use
from .choice import RuleChoice, Rules, check_rule
from .direction import Gradient, Normalized, Sides
from .ekfac import EKFAC
from .eva import Eva
from .hybrid import Hybrid
from .hyper import Hyper
from .kfac import KFAC
from .mkor import MKOR
from .shampoo import Shampoo
from .soap import SOAP

__all__ = [
    "EKFAC",
    "KFAC",
    "MKOR",
    "SOAP",
    "Eva",
    "Gradient",
    "Hybrid",
    "Hyper",
    "Kind",
    "Normalized",
    "Rule",
    "RuleChoice",
    "Rules",
    "Shampoo",
    "Shape",
    "Sides",
    "State",
    "Use",
    "check_rule",
]
