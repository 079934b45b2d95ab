"""When a weight's state is due: at its first step in a window of so many steps, whichever steps it takes part in. Where
weights take turns, windows of different phases begin at different steps."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from .factors import FactorState


class Due(Exception):
    """A program was about to reuse state of ``names`` not refreshed yet in this window; ``variant`` refreshes it."""

    def __init__(self, names: Set[str], variant: Any) -> None:
        super().__init__()
        self.names, self.variant = names, variant


class Windows:
    """The last window in which something was done, by weight. Of loaded state it is taken to be that of the last step."""

    def __init__(self, mkor: FactorState) -> None:
        self._mkor = mkor
        self._last: dict[str, int] = {}
        self._generation = mkor.generation

    def due(self, names: Iterable[str], step: int, every: int) -> set[str]:
        """Those for which nothing was done yet in the window of ``every`` steps that ``step`` lies in."""
        self._follow()
        return {name for name in names if self._window(name, step, every) > self._last_window(name, every)}

    def done(self, names: Iterable[str], step: int, every: int) -> None:
        self._follow()
        self._last |= {name: self._window(name, step, every) for name in names}

    def place(self, name: str, step: int, every: int) -> int:
        """How many steps of its window a weight has behind it."""
        return (step + self._mkor.rotation.offset(name)) % every

    def _window(self, name: str, step: int, every: int) -> int:
        return (step + self._mkor.rotation.offset(name)) // every

    def _last_window(self, name: str, every: int) -> int:
        """-1: nothing was done yet."""
        loaded = self._mkor.loaded_step
        return self._last.get(name, self._window(name, loaded - 1, every) if loaded else -1)

    def _follow(self) -> None:
        if self._generation != self._mkor.generation:
            self._generation, self._last = self._mkor.generation, {}
