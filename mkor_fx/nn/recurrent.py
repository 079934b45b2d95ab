"""Recurrent cells whose two weights are Kronecker products (KP-RNN: Thakker et al., 2019, arXiv 1910.02558)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .kronecker import Kronecker


class KroneckerCell(nn.Module):
    """What the cells below share: ``input`` maps ``[*, I]`` and ``hidden`` maps ``[*, H]`` to ``[*, gates H]``, each a
    :class:`Kronecker`, with gates stacked as in torch's cells.

    Over ``T`` steps each factor is used ``T`` times, and all of these are rows of its statistics. Where ``a1`` of ``A`` is a
    multiple of the number of gates each gate has rows of ``A`` of its own, and all share ``B``.

    Args:
        input_size, hidden_size: ``I``, ``H``.
        bias: whether each of the two maps has a bias.
        input_left, hidden_left: the shape of either weight's left factor, as ``left`` of :class:`Kronecker`.
        device, dtype: of the parameters.

    Raises:
        ValueError: as :class:`Kronecker`; from a call, for a state whose shape does not fit.
    """

    gates: ClassVar[int] = 1

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, input_left: tuple[int, int] | None = None,
        hidden_left: tuple[int, int] | None = None, **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        outputs = self.gates * hidden_size
        self.input = Kronecker(input_size, outputs, bias, left=input_left, **factory)
        self.hidden = Kronecker(hidden_size, outputs, bias, left=hidden_left, **factory)

    def _state(self, x: Tensor, h: Tensor | None) -> Tensor:
        needed = (*x.shape[:-1], self.hidden_size)
        if h is not None and h.shape != needed:
            raise ValueError(f"{type(self).__name__}: a state of {tuple(h.shape)}, needs {needed}, as the inputs")
        return x.new_zeros(needed) if h is None else h

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class KroneckerRNNCell(KroneckerCell):
    """``h' = tanh(W_x x + b_x + W_h h + b_h)``, as ``nn.RNNCell``. Arguments as :class:`KroneckerCell`."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """``[*, I]``, ``[*, H] -> [*, H]``; no state is zeros."""
        return torch.tanh(self.input(x) + self.hidden(self._state(x, h)))


class KroneckerGRUCell(KroneckerCell):
    """Gated recurrent unit, as ``nn.GRUCell``. Arguments as :class:`KroneckerCell`.

    With ``r, z, n`` the gates of ``W_x x + b_x``, primed those of ``W_h h + b_h``:

        ``r = sigmoid(r + r'),  z = sigmoid(z + z'),  n = tanh(n + r n'),  h' = (1 - z) n + z h``
    """

    gates = 3

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """``[*, I]``, ``[*, H] -> [*, H]``; no state is zeros."""
        h = self._state(x, h)
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (y.chunk(3, -1) for y in (self.input(x), self.hidden(h)))
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        return n + z * (h - n)


class KroneckerLSTMCell(KroneckerCell):
    """Long short-term memory, as ``nn.LSTMCell``. Arguments as :class:`KroneckerCell`.

    With ``i, f, g, o`` the gates of ``W_x x + b_x + W_h h + b_h``:

        ``c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c')``
    """

    gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``[*, I]``, ``([*, H], [*, H]) -> ([*, H], [*, H])``: the states ``(h, c)``; none are zeros."""
        h, c = (self._state(x, part) for part in (state or (None, None)))
        i, f, g, o = (self.input(x) + self.hidden(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
