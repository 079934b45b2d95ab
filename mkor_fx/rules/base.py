"""What an update rule is: four pure functions of tensors, plain torch code, traced once per shape.

Shape suffixes: ``N`` rows, ``I`` inputs, ``O`` outputs of one weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One matrix of a preconditioned weight as a rule sees it: ``O`` outputs, ``I`` inputs, maybe with a bias of ``O``.

    ``lookup``: the inputs are one-hots (an embedding of a vocabulary of ``I``).
    """

    O: int  # noqa: E741
    I: int  # noqa: E741
    bias: bool = False
    lookup: bool = False


class Use(NamedTuple):
    """What ``summarize`` returned, summed over all rows, micro-batches and ranks; ``rows`` is their number, 0-dim.

    ``opposite``: the weight was used the other way round (an embedding whose table is also the output layer). Then the
    summary's inputs lie along ``O`` and its output gradients along ``I``.
    """

    summary: tuple[Tensor, ...]
    rows: Tensor
    opposite: bool


class Gradient(NamedTuple):
    """``weight`` is ``[O, I]`` whatever way the parameter is stored; ``bias`` is ``[O]`` or None."""

    weight: Tensor
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: t for name, t in self._asdict().items() if t is not None}


State = dict[str, Tensor]


class Rule(ABC):
    """An update rule. Subclasses are frozen dataclasses: a rule is its options and holds no tensors.

    It is written for one matrix. A batch of them (experts, groups of a convolution) runs under ``vmap``, each member with
    a state of its own. Where its operands are not finite, or a member has seen no row, the library keeps the old state,
    so ``update`` need not look.
    """

    #: whether ``update`` reads the gradient (then a gradient that is not finite leaves the state alone, too)
    reads_gradient: bool = False

    @abstractmethod
    def init(self, shape: Shape, device: torch.device) -> State:
        """Fresh state of one weight, by name. Empty: nothing to precondition with, the weight is declined."""

    def preconditions_bias(self, shape: Shape) -> bool:
        """Whether a matched bias gets a direction of its own. If not, it is declined and keeps its raw gradient."""
        return True

    @abstractmethod
    def summarize(self, shape: Shape, a_NI: Tensor, g_NO: Tensor) -> tuple[Tensor, ...]:
        """What one use of the weight contributes, as sums over rows: exactly what crosses the network.

        ``shape`` is the weight as this use sees it: the other way round in an opposite one.
        """

    @abstractmethod
    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        """New state from this step's statistics; refresh steps only. ``step`` is 0-dim int64, 0 on the first."""

    @abstractmethod
    def precondition(self, state: State, grad: Gradient) -> Gradient:
        """The direction that the base optimizer gets in place of the gradient; every step."""

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        """The summary without a loss scale: what ``summarize`` would have returned for ``g_NO / scale``."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its statistics depend on the scale of the loss: define "
            "unscale(summary, scale) to use it with a gradient scaler"
        )
