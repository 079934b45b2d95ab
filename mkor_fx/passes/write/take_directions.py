"""Directions that another program has made."""

from __future__ import annotations

from ..core import graph_pass
from .update_draft import UpdateDraft


@graph_pass(stage="rewrite")
def take_directions(draft: UpdateDraft) -> None:
    """What is passed as gradients are directions, each the step itself."""
    draft.takes_steps = True
    for item in draft.items.values():
        found = {key: node for key, node in ((item.key, item.grad), (item.bias_key, item.bias)) if node is not None}
        draft.directions |= found
        draft.final |= found.keys()
