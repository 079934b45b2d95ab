"""A joint graph of the drop-in door as a draft: statistics leave it as gradients of its carriers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from ...ir import StepGraph
from ...rules import Rule
from ..match.layout import Layout
from ..torch_api.capture import described_gradients
from .carrier import Carrier
from .draft import Draft, Item


@dataclass(frozen=True)
class Added:
    """Inputs of one site behind Dynamo's, by position: its carrier, then its ``state``, by name, where the graph reads
    it."""

    carrier: int
    geometry: Carrier
    state: tuple[str, ...] = ()

    def positions(self) -> dict[str, int]:
        return {name: self.carrier + 1 + i for i, name in enumerate(self.state)}


class Shared(NamedTuple):
    """Where a graph is passed, once for all sites, what changes over time in the rules and what random signs are drawn by;
    None: not at all."""

    numbers: int | None = None
    draw: int | None = None


class JointDraft(Draft):
    """``added`` are the further inputs of each site, ``shared`` those of all.

    ``outputs`` are what the graph returns, gradients among them, at the ``positions`` of the inputs that they belong to;
    ``norms`` what sizes the directions of the next step.
    """

    def __init__(
        self,
        step: StepGraph,
        rules: Sequence[Rule],
        added: Mapping[int, Added],
        shared: Shared = Shared(),  # noqa: B008  (a tuple)
    ) -> None:
        super().__init__(step, rules)
        self.added, self.shared = added, shared
        self.norms: dict[Any, fx.Node] = {}
        self.outputs = list(step.output.args[0])
        self.positions = described_gradients(step.graph)
        for index, site in step.sites.items():
            name, bias = site.parameter.name, None if site.bias is None else site.bias.index
            item = Item(name, Layout.of(site), f"{name}: precondition", index, bias)
            item.grad, item.bias = site.parameter.grad, None if site.bias is None else site.bias.grad
            item.state = {key: step.inputs[at] for key, at in added[index].positions().items()}
            if added[index].geometry.norms:
                item.scale = item.state.pop("scale")
            self.items[index] = item

    def packed_numbers(self) -> fx.Node:
        assert self.shared.numbers is not None
        return self.step.inputs[self.shared.numbers]

    def draw(self) -> fx.Node:
        assert self.shared.draw is not None
        return self.step.inputs[self.shared.draw]

    def hand_out(self) -> None:
        for index, item in self.items.items():
            item.vectors = self.statistics.get(index, {})

    def finish(self) -> None:
        for key, direction in self.directions.items():
            self.outputs[self.positions[key]] = direction
        self.step.output.args = (tuple(self.outputs),)
