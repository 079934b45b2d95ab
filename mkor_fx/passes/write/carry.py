"""Statistics out of a backward graph."""

from __future__ import annotations

from torch import Tensor

from ..core import graph_pass
from .carrier import Carrier
from .joint_draft import JointDraft


@graph_pass(stage="rewrite")
def carry(draft: JointDraft) -> None:
    """Write what each site's uses come to into the gradient of its carrier, which the forward does not use."""
    for index, item in draft.items.items():
        if not item.vectors:
            continue
        added = draft.added[index]
        at = draft.positions[added.carrier]
        draft.outputs[at] = draft.insert(
            _pack, added.geometry, item.vectors, draft.norms.get(index), label=f"{item.name}: statistics"
        )


def _pack(geometry: Carrier, vectors: dict[int, Tensor], norms: Tensor | None) -> Tensor:
    return geometry.pack(vectors, norms)
