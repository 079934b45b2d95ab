"""Optimizers and schedules that stand alone: plain torch, whether or not a step is compiled."""

from .knee import KneePointLR
from .lamb import LAMB

__all__ = ["LAMB", "KneePointLR"]
