"""One line of a coverage table: a trainable parameter, and what is said of many of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .. import reasons
from ..ir import Decline, product
from ..passes.match.layout import Layout
from ..rules import Rule
from .costs import Work

#: of a parameter that no captured graph has shown yet
UNSEEN = Decline(reasons.UNSEEN)


@dataclass(frozen=True)
class Entry:
    """One trainable parameter. ``factors`` are the shapes of its state; ``declined`` is None for what is covered. ``shares``
    says of a bias what of its weight's state it uses.

    ``sources`` are the user's lines that use it (``"model.py:12"``), ``modules`` the paths of the modules that they run in.
    """

    name: str
    shape: tuple[int, ...]
    op: str = ""
    uses: int = 0
    factors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    state_bytes: int = 0
    sent: int = 0
    bias_of: str = ""
    shares: str = ""
    declined: Decline | None = None
    sources: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    work: Work | None = None
    rule: Rule | None = None

    @property
    def elements(self) -> int:
        return product(self.shape)

    @property
    def matrix(self) -> bool:
        """Whether at least two of its dimensions are larger than one: what a Kronecker-factored rule is for."""
        return sum(size > 1 for size in self.shape) >= 2

    @property
    def note(self) -> str:
        """Its factors (the matrices of its state, where there are any), whose factor it shares, or why it has none."""
        if self.declined is not None:
            return str(self.declined)
        if self.bias_of:
            return f"{self.shares} of {self.bias_of}"
        matrices = {k: s for k, s in self.factors.items() if len(s) > 1}
        return ", ".join(f"{k} {times(s)}".strip() for k, s in (matrices or self.factors).items())


class Fractions(NamedTuple):
    """Covered fractions: of the trainable parameters, of their elements, and both of the matrix parameters alone."""

    parameters: float
    elements: float
    matrix_parameters: float
    matrix_elements: float


def unseen(model: nn.Module) -> dict[str, Entry]:
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: Entry(name, tuple(p.shape), declined=UNSEEN) for name, p in named}


def shared_by_bias(layout: Layout) -> str:
    """What of its weight's state a bias is preconditioned with, by name: the left side, both where they are one matrix."""
    left, right = layout.sides
    names = [left, right] if layout.rule.joint_bias else [left]
    return ", ".join(dict.fromkeys(name or "the state" for name in names if name is not None)) or "the state"


def times(shape: Sequence[int]) -> str:
    """``(3, 4) -> "3x4"``"""
    return "x".join(map(str, shape))


def share_of(entries: list[Entry]) -> tuple[float, float]:
    """Covered fraction of entries and of their elements; of nothing, all is covered."""
    covered = [entry for entry in entries if entry.declined is None]
    elements, total = (sum(entry.elements for entry in some) for some in (covered, entries))
    return len(covered) / len(entries) if entries else 1.0, elements / total if total else 1.0
