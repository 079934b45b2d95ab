"""What an update rule is: pure functions of tensors, plain torch code, traced once per shape.

Shape suffixes: ``N`` rows, ``I`` inputs, ``O`` outputs of one weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..kinds import Kind
from .direction import Gradient, Normalized, Sides, from_sides
from .hyper import Hyper, bind, changing, number


@dataclass(frozen=True)
class Shape:
    """One matrix of a preconditioned weight as a rule sees it: ``O`` outputs, ``I`` inputs, maybe with a bias of ``O``.

    ``lookup``: the inputs are one-hots (an embedding of a vocabulary of ``I``). ``opposite``: as a use sees it that has the
    weight the other way round, see :class:`Use`.
    """

    O: int  # noqa: E741
    I: int  # noqa: E741
    bias: bool = False
    lookup: bool = False
    opposite: bool = False


class Use(NamedTuple):
    """What ``summarize`` returned, summed over all rows, micro-batches and ranks; ``rows`` is their number, 0-dim.

    ``opposite``: the weight was used the other way round (an embedding whose table is also the output layer). Then the
    summary's inputs lie along ``O`` and its output gradients along ``I``.
    """

    summary: tuple[Tensor, ...]
    rows: Tensor
    opposite: bool


State = dict[str, Tensor]


class Rule(ABC):
    """An update rule. Subclasses are frozen dataclasses: a rule is its options and holds no state.

    It is written for one matrix. A batch of them (experts, groups of a convolution) runs under ``vmap``, each member with
    a state of its own. Where its operands are not finite, or a member has seen no row, the library keeps the old state,
    so no function need look.

    What runs when, at step ``t``: ``update`` if the step refreshes; ``advance``; then the direction, by ``sides`` and
    ``normalize`` or by ``precondition``; and behind the step ``derive``, if ``t`` is a multiple of ``derive_every``. A field
    annotated ``Hyper`` may be a number, a 0-dim tensor or a function of the step: the rule's code then sees a 0-dim tensor.

    A rule has to define ``init``, ``summarize``, ``update`` and one of ``sides`` and ``precondition``.
    """

    #: whether ``update`` reads the gradient (then a gradient that is not finite leaves the state alone, too)
    reads_gradient: bool = False
    #: whether ``summarize`` reads the state: it is called with ``state=`` as well
    reads_state: bool = False
    #: whether ``summarize`` draws random signs: it is called with ``key=`` as well, 0-dim int64, another one in each step,
    #: micro-batch and rank, for ``mkor_fx.prims.sketch(rows, key, ...)``
    draws: bool = False
    #: for how many ranks, and micro-batches of a step, a summary has slots, so that the sum over all gathers what each wrote
    #: into its own; with ``draws``, whose key says which: ``key & 0xFFFF`` is the rank, ``(key >> 16) & 0xFFFF`` the call of
    #: the step, modulo the micro-batches. Two in one slot are refused. None: it has none, and is a sum over any number
    gathers: tuple[int, int] | None = None
    #: what sizes a direction D: "gradient": the norm of the raw gradient; "rms": a root mean square of 0.2, so
    #: ``0.2 sqrt(O I) / |D| * D``, the size of Adam's updates; None: nothing. A bias alike, by its own norm.
    graft: Literal["gradient", "rms"] | None = None
    #: whether ``[W | b]`` is one matrix of ``I + 1`` columns, in its right side and for its size
    joint_bias: bool = False
    #: dtype of the two products; None is that of the gradient; "fast" is bfloat16 for float32 gradients, where the device
    #: multiplies that natively, and else the gradient's
    product_dtype: torch.dtype | Literal["fast"] | None = None
    #: bound on what a step may change, by ``sum lr^2 <D, G>`` over all weights of the rule, which shorten alike (in
    #: ``compile``: over those that one optimizer steps); None: none. For rules with ``graft=None``
    kl_clip: Hyper | None = None
    #: "gradient": the base optimizer gets the direction in place of the gradient. "update": the direction is the step
    #: itself, ``W <- W (1 - lr wd) - lr D`` with the rate and weight decay of the weight's own group, and the base
    #: optimizer leaves the weight alone.
    applies: Literal["gradient", "update"] = "gradient"
    #: whether the size of such a step follows the base optimizer, so that its rate keeps its meaning: behind Adam and its
    #: relatives ``adam_rms`` sizes it, else ``graft``; behind SGD it is as long as SGD's own step, and the fields
    #: ``momentum`` and ``nesterov`` are SGD's where that has a momentum; behind LAMB and LARS as long as the weight; behind
    #: anything else the direction goes in as a gradient, in the raw gradient's size
    follows_optimizer: bool = False
    #: steps between two calls of ``derive``
    derive_every: int = 1

    #: what the tensors of a state are, by name; of others ``metrics()`` says nothing
    kinds: ClassVar[dict[str, Kind]] = {}

    def without_state(self, shape: Shape) -> str:
        """Why ``init`` gives no state, for the reader of a table."""
        return ""

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

    def advance(self, state: State, grad: Gradient, step: Tensor) -> State:
        """New state from this step's gradient, every step: moments, moving averages."""
        return state

    def derive(self, state: State) -> State:
        """New state from the state alone, every ``derive_every`` steps and outside of the compiled program: inverses,
        eigendecompositions, QR. The next step is the first to see it. Of a batch it runs under ``vmap`` as well, where no
        value can be read on the host."""
        return state

    def moment(self, state: State, grad: Gradient) -> Gradient:
        """What the sides multiply: the gradient, or what ``advance`` has made of it."""
        return grad

    def adam_rms(self, state: State, moment: Gradient) -> Tensor | None:
        """Root mean square of the step that Adam would take with one second moment for the whole matrix, 0-dim: 1 while
        gradients agree, ``sqrt((1 - mu) / (1 + mu))`` in noise. None: unknown, and steps that are as long as Adam's have
        0.2."""
        return None

    def sides(self, state: State) -> Sides | None:
        """The two sides of the direction, which the library multiplies; None for a rule that has ``precondition``."""
        return None

    def normalize(self, state: State, product: Tensor, moment: Tensor) -> Normalized:
        """What becomes of the product of the two sides with the ``moment``, both ``[O, I]``, before it is sized, and the new
        state. Every step; for moments of what the factors have made of it."""
        return Normalized(product, state)

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        """The direction; every step. A rule whose direction is no product of two sides defines it, and the library sizes
        what it returns. The default is the product of the two sides, sized."""
        outputs, inputs = grad.weight.shape
        if grad.bias is not None and not self.preconditions_bias(Shape(outputs, inputs, bias=True)):
            return from_sides(self, state, Gradient(grad.weight), self.graft)[0]._replace(bias=grad.bias)
        return from_sides(self, state, grad, self.graft)[0]

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        """The summary without a loss scale: what ``summarize`` would have returned for ``g_NO / scale``. Asked for under a
        gradient scaler and, in ``compile``, on several ranks, each of which differentiates its own loss."""
        if not summary:
            return summary
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its statistics depend on the scale of the loss: define "
            "unscale(summary, scale) to use it with a gradient scaler, or with mkor_fx.compile on several ranks"
        )

    @cached_property
    def at_first_step(self) -> Rule:
        """This rule as it is at step 0, with plain numbers only."""
        return bind(self, {name: number(value, f"{type(self).__name__}({name}=") for name, value in changing(self).items()})

    def overrides(self, function: str) -> bool:
        """Whether this rule has a ``function`` of its own in the place of the default."""
        return getattr(type(self), function) is not getattr(Rule, function)
