"""Optimizers and schedules that stand alone: plain torch, whether or not a step is compiled."""

from .adalayer import Adalayer
from .hfac import HFac
from .knee import KneePointLR
from .lamb import LAMB
from .smmf import SMMF

__all__ = ["LAMB", "SMMF", "Adalayer", "HFac", "KneePointLR"]
