"""When a weight's state is due: at its first step in a window of so many steps, whichever steps it takes part in."""

from __future__ import annotations

from collections.abc import Iterable

from .factors import FactorState


class Windows:
    """The last window in which something was done, by weight. Of loaded state it is taken to be that of the last step."""

    def __init__(self, mkor: FactorState) -> None:
        self._mkor = mkor
        self._last: dict[str, int] = {}
        self._generation = mkor.generation

    def due(self, names: Iterable[str], step: int, every: int) -> set[str]:
        """Those for which nothing was done yet in the window of ``every`` steps that ``step`` lies in."""
        self._follow()
        before = (self._mkor.loaded_step - 1) // every
        return {name for name in names if step // every > self._last.get(name, before)}

    def done(self, names: Iterable[str], step: int, every: int) -> None:
        self._follow()
        self._last.update(dict.fromkeys(names, step // every))

    def _follow(self) -> None:
        if self._generation != self._mkor.generation:
            self._generation, self._last = self._mkor.generation, {}
