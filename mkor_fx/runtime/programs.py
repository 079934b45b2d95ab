"""The programs of a compiled step, for each way in which its optimizers answer their own branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .optimizers import Groups

#: answers that are kept, those that were used last
KEPT = 8


@dataclass
class Answered:
    """The programs that hold as long as each of ``branches`` does (``branch.holds(optimizers)``), by their variants; and the
    traced ``updates`` that are part of them, by the parameters' identities."""

    branches: tuple = ()
    updates: dict[tuple[int, ...], Any] = field(default_factory=dict)
    by_variant: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def hold(self, optimizers: Groups) -> bool:
        return all(branch.holds(optimizers) for branch in self.branches)


class Programs:
    """``now`` are those of this step."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._kept = [Answered()]

    @property
    def now(self) -> Answered:
        return self._kept[0]

    def choose(self, optimizers: Groups) -> None:
        """Let ``now`` be the programs for the optimizers as they are. Where a branch depends on a count, waits for the
        step that has changed it."""
        chosen = next((each for each in self._kept if each.hold(optimizers)), None) or Answered()
        self._kept = [chosen, *(each for each in self._kept if each is not chosen)][:KEPT]
