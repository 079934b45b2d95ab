"""Layers whose weights are Kronecker products: plain torch, whether or not a step is compiled."""

from .kronecker import Kronecker
from .recurrent import KroneckerCell, KroneckerGRUCell, KroneckerLSTMCell, KroneckerRNNCell

__all__ = ["Kronecker", "KroneckerCell", "KroneckerGRUCell", "KroneckerLSTMCell", "KroneckerRNNCell"]
