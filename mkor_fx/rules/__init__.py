"""Update rules, one file each."""

from ..kinds import Kind
from .base import Rule, Shape, State, Use
from .choice import RuleChoice, Rules, check_rule
from .direction import Gradient, Normalized, Sides
from .eva import Eva
from .hybrid import Hybrid
from .hyper import Hyper
from .kfac import KFAC
from .kldwrm import KLDWRM
from .mkor import MKOR
from .singd import SINGD

__all__ = [
    "KFAC",
    "KLDWRM",
    "MKOR",
    "SINGD",
    "Eva",
    "Gradient",
    "Hybrid",
    "Hyper",
    "Kind",
    "Normalized",
    "Rule",
    "RuleChoice",
    "Rules",
    "Shape",
    "Sides",
    "State",
    "Use",
    "check_rule",
]
