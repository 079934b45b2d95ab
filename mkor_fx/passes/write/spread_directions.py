"""Directions of owners to all ranks."""

from __future__ import annotations

from ..core import graph_pass
from .draft import Draft


@graph_pass(stage="rewrite")
def spread_directions(draft: Draft) -> None:
    """Every weight's direction on every rank, where each rank has made its own weights' alone."""
    draft.spread_directions()
