"""Work dealt out evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def deal(costs: Mapping[str, float], held: Sequence[float]) -> dict[str, int]:
    """A place for each name, longest processing time first: the costliest to the place that has the least, of places that
    have ``held`` so much before. Equal ones in their order: the same on every rank."""
    held, found = list(held), dict[str, int]()
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable
        found[name] = held.index(min(held))
        held[found[name]] += costs[name]
    return found
