"""What each weight's uses in this program come to."""

from __future__ import annotations

from ...prims import accumulation_dtype
from ..core import graph_pass
from .draft import Draft
from .vectors import write_vectors


@graph_pass(stage="rewrite")
def statistics(draft: Draft) -> None:
    """A statistics vector for each orientation in which a site's weight is used; none of weights whose statistics
    another rank takes alone."""
    graph = draft.graph
    for index, site in draft.step.sites.items():
        assert site.rule is not None
        dtype, name = accumulation_dtype(site.parameter.node.meta["val"].dtype), site.parameter.name
        if index in draft.elsewhere or (draft.due is not None and name not in draft.due):
            continue
        numbers = draft.numbers(site.rule)
        state = draft.items[index].state if index in draft.items else {}
        with graph.inserting_before(draft.step.output):
            key = draft.draw() if site.rule.draws else None
            vectors = write_vectors(graph, site, numbers, state, key, dtype)
        draft.statistics[index] = vectors
    draft.hand_out()
