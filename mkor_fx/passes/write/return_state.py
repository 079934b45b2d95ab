"""New state as what a program returns."""

from __future__ import annotations

from ..core import graph_pass
from .update_draft import UpdateDraft


@graph_pass(stage="rewrite")
def return_state(draft: UpdateDraft) -> None:
    """Hand new state out in place of writing it: a backward whose forward has run keeps the tensors that it has saved."""
    draft.writes.clear()
    for item in draft.items.values():
        draft.outputs += [*item.state.values(), *([] if item.scale is None else [item.scale])]
