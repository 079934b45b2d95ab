"""Optimizers and schedules that stand alone: plain torch, whether or not a step is compiled."""

from .adalayer import Adalayer
from .coap import COAP
from .hfac import HFac
from .knee import KneePointLR
from .lamb import LAMB
from .smmf import SMMF

__all__ = ["COAP", "LAMB", "SMMF", "Adalayer", "HFac", "KneePointLR"]
