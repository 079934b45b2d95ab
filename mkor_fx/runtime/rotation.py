"""Which weights refresh at which steps: all at once, or in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .balance import deal
from .checkpoint import some


@dataclass(frozen=True)
class Rotation:
    """Weights refresh every ``every`` steps, those of each of ``phases`` at steps of their own, which are evenly spaced.

    A weight of phase ``k``, by name in ``phase``, has its turn where ``step + k * every // phases`` is a multiple of
    ``every``, and at step 0 as all others.
    """

    every: int = 1
    phases: int = 1
    phase: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, every: int, phases: int, costs: Mapping[str, int]) -> Rotation:
        """Phases of about the same cost: the costliest weights first, dealt out to and fro. So any part of the weights,
        as those that are not frozen, is spread over the phases too."""
        order = sorted(costs, key=lambda name: -costs[name])  # stable
        round_trip = [*range(phases), *reversed(range(phases))]
        return cls(every, phases, {name: round_trip[i % len(round_trip)] for i, name in enumerate(order)})

    @classmethod
    def slots(cls, every: int, costs: Mapping[str, int], offset: Callable[[str], int]) -> dict[str, int]:
        """How many steps behind the first one of its window each weight has its turn, so that all of ``every`` steps
        cost about the same: the costliest first, each to the step with the least so far. ``offset``: by how many steps
        its windows begin earlier."""
        return {name: (at + offset(name)) % every for name, at in deal(costs, [0] * every).items()}

    def offset(self, name: str) -> int:
        """By how many steps the windows of a weight begin earlier than those of phase 0."""
        return self.phase.get(name, 0) * self.every // self.phases

    def turn(self, step: int) -> tuple[int, list[str]] | None:
        """The phase whose turn a step is, and its weights; no weights where it is nobody's. None: all weights are alike."""
        if self.phases == 1 or step == 0:
            return None
        turns = (k for k in range(self.phases) if (step + k * self.every // self.phases) % self.every == 0)
        phase = next(turns, -1)
        return phase, self.weights(phase)

    def weights(self, phase: int) -> list[str]:
        """Those of a phase, the costliest first."""
        return [name for name, own in self.phase.items() if own == phase]

    def metrics(self, steps: int) -> dict[str, float]:
        """How often each weight has refreshed in so many steps, of those in turns the fewest times."""
        turns = {} if self.phases == 1 else {"refresh_phases": self.phases}
        return {"refreshes": -(-steps // self.every), **turns}

    def __str__(self) -> str:
        return f"refresh every {self.every}" + (f" in {self.phases} phases" if self.phases > 1 else "")

    def table(self) -> str:
        """A line for each phase, where there are several."""
        if self.phases == 1:
            return ""
        lines = [f"  phase {phase}: {some(self.weights(phase))}" for phase in range(self.phases)]
        return "\n".join(["", f"{self} of about the same cost:", *lines])
