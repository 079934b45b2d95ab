"""Statistics that carriers have brought."""

from __future__ import annotations

from ..core import graph_pass
from .carrier import Carrier
from .update_draft import UpdateDraft


@graph_pass(stage="rewrite")
def receive(draft: UpdateDraft) -> None:
    """The statistics vectors of each weight that refreshes, of all ranks together; where weights have owners, of this
    rank alone."""
    network = None if draft.local else draft.network
    with draft.graph.inserting_before(draft.step.output):
        for key, carrier in draft.carriers.items():
            item, whole = draft.items[key], carrier.meta["val"].shape[0] > 2
            if network is not None and whole:  # norms and all
                carrier = draft.carriers[key] = network.sum(carrier, "statistics", item.name)
            if key not in draft.refreshes:
                continue
            item.vectors = draft.insert(Carrier.vectors, carrier, item.layout.kinds, label=item.name)
            if network is not None and not whole:
                item.vectors = {k: network.sum(v, "statistics", item.name) for k, v in item.vectors.items()}
