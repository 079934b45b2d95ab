"""The order of collectives and compute, kept through Inductor."""

from __future__ import annotations

from torch import fx

from ..sources import library_sources
from ..torch_api.backend import PostGradPass, depend
from .collectives import is_start
from .schedule import hidden_under, is_heavy, order


def pin(graph: fx.Graph) -> None:
    """Make the order of collectives and heavy work a dependency.

    Inductor's scheduler is free to delay a collective, and to wait for it early, which saves memory. So the first product
    behind a start depends on the start, and a wait on all products and starts that are to come in between.
    """
    needs: dict[fx.Node, list[fx.Node]] = {}
    for wait, between in hidden_under(graph).items():
        first = next(filter(is_heavy, between), None)
        if first is not None and is_start(wait.args[0]):
            needs.setdefault(first, []).append(wait.args[0])
        if between:
            needs[wait] = between
    number = {node: i for i, node in enumerate(graph.nodes)}
    depend(graph, {node: needs[node] for node in sorted(needs, key=number.__getitem__)})


class Overlap(PostGradPass):
    """Behind Inductor's own graph passes, which sort for locality: schedule again, then pin. ``divided``: whether ranks have
    graphs of their own."""

    def __init__(self, divided: bool = False) -> None:
        self.divided = divided

    def __call__(self, graph: fx.Graph) -> None:
        order(graph, self.divided)
        pin(graph)

    def uuid(self) -> bytes:
        return library_sources() + (b" divided" if self.divided else b"")
