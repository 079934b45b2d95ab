"""Update rules, one file each."""

from ..kinds import Kind
from .adafisher import AdaFisher
from .base import Rule, Shape, State, Use
from .cgfac import CGFAC
from .choice import RuleChoice, Rules, check_rule
from .direction import Gradient, Normalized, Sides
from .ekfac import EKFAC
from .eva import Eva
from .hybrid import Hybrid
from .hylo import HyLo
from .hyper import Hyper
from .kfac import KFAC
from .kldwrm import KLDWRM
from .mkor import MKOR
from .shampoo import Shampoo
from .singd import SINGD
from .soap import SOAP
from .thermodynamic import ThermodynamicKFAC

__all__ = [
    "CGFAC",
    "EKFAC",
    "KFAC",
    "KLDWRM",
    "MKOR",
    "SINGD",
    "SOAP",
    "AdaFisher",
    "Eva",
    "Gradient",
    "HyLo",
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
    "ThermodynamicKFAC",
    "Use",
    "check_rule",
]
