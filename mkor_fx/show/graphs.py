"""The programs of a model to look at: recordings with pages and drawings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from .drawing import write_svg
from .recorder import Recording, Stage
from .report import write_report

Path = str | os.PathLike[str]


class Covered(Protocol):
    """What a page says of coverage."""

    def to_dict(self) -> dict[str, Any]: ...


class Graphs(Recording):
    """A recording of one program, and what can be made of it. ``refreshes``: whether the program refreshes state."""

    def __init__(self, title: str, coverage: Covered | None = None, refreshes: bool = True) -> None:
        super().__init__(title)
        self.coverage, self.refreshes = coverage, refreshes

    def to_html(self, path: Path) -> None:
        """One page, for any browser and without a network: coverage, stages, diffs of any two, generated code."""
        write_report(path, self.title, [self], self.coverage)

    def to_svg(self, path: Path, name: str) -> None:
        """Draw how one weight's gradient is made and used: product, operands, statistics, update. Needs Graphviz' ``dot``.

        Raises:
            ValueError: no such weight among the matched ones, or no ``dot``.
        """
        write_svg(path, name, [self])


class ModelGraphs:
    """All programs of a model: ``list(graphs)``, or the stages of the first captured one by name.

    ``captured``: forward and backward, one a graph (a whole step: one a variant). ``updates``: what runs at the optimizer's
    step.
    """

    def __init__(self, coverage: Covered, title: str) -> None:
        self.coverage, self.title = coverage, title
        self.captured: list[Graphs] = []
        self.updates: list[Graphs] = []

    def __iter__(self) -> Iterator[Graphs]:
        return iter([*self.captured, *self.updates])

    def __getitem__(self, stage: str) -> Stage:
        return self._first[stage]

    def op_counts(self, stage: str) -> Counter[str]:
        return self._first.op_counts(stage)

    def diff(self, before: str, after: str) -> str:
        return self._first.diff(before, after)

    def to_html(self, path: Path) -> None:
        """As :meth:`Graphs.to_html`, with every program on the page."""
        assert self._first
        write_report(path, self.title, list(self), self.coverage)

    def to_svg(self, path: Path, name: str) -> None:
        """As :meth:`Graphs.to_svg`, with the part of every program that works on the weight."""
        assert self._first
        write_svg(path, name, list(self))

    @property
    def _first(self) -> Graphs:
        if not self.captured:
            raise RuntimeError("nothing is compiled yet: call the model once with gradients enabled")
        return self.captured[0]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) or "nothing is compiled yet"

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model is a plain one."""

    def __reduce__(self) -> tuple:
        return type(None), ()
