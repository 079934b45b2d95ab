"""The programs of the drop-in door that run outside of its graphs, as drafts written from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ...ir import StepGraph
from ...rules import Rule
from ...runtime.base_step import BaseStep
from ...runtime.given import Given
from ..match.layout import Layout
from ..order.collectives import Group, Network
from ..torch_api.backend import eliminate_dead_code, new_fake_mode
from ..torch_api.tracing import add_input
from .delivery import from_owner
from .draft import Draft, Item, Rate
from .finite import total
from .sizing import Sizing
from .vectors import Scales

#: where the rate and the weight decay of a parameter lie in its optimizer's numbers, and the sign of its steps
Place = tuple[int, int | None, float]


@dataclass(frozen=True)
class Job:
    """One weight in an update program: its layout, and whether its state is refreshed. ``places`` are those of the weight's
    and its bias's rates, where their direction is the step itself or depends on them; ``base`` is what the optimizer
    would do with its gradient. ``owner`` is the rank that refreshes and preconditions it for all; None: every rank does.
    """

    name: str
    layout: Layout
    refresh: bool
    places: tuple[Place | None, Place | None] = (None, None)
    base: BaseStep | None = None
    owner: int | None = None

    @property
    def sizing(self) -> Sizing:
        return Sizing.of(self.layout.rule, self.base)

    @property
    def bounded(self) -> bool:
        """Whether the length of its direction depends on the weight and its rate."""
        return self.sizing.graft == "adam"

    @property
    def needs_rates(self) -> bool:
        """Whether its direction depends on the rates that it and its bias are stepped with."""
        return self.bounded or self.layout.rule.kl_clip is not None

    @property
    def final(self) -> bool:
        """Whether its direction is the step itself."""
        return self.sizing.final


class UpdateDraft(Draft):
    """A program whose inputs are the leaves of ``given``: gradients, carriers, state and what all weights share.

    With a ``group`` statistics are summed over its ranks, on each of which they belong to that rank's own loss, while
    gradients are the mean's already. Where weights have owners (``local``) statistics are those of the owner's rows
    alone, and only its own weights are items. ``carriers`` are by item, ``refreshes`` the items whose state is refreshed.
    """

    def __init__(self, jobs: Sequence[Job], rules: Sequence[Rule], given: Given, group: Group | None) -> None:
        graph, mode = fx.Graph(), new_fake_mode()
        leaves, spec = pytree.tree_flatten(given)
        nodes = [
            add_input(graph, name, leaf, mode) if isinstance(leaf, Tensor) else leaf
            for name, leaf in zip(_names(given), leaves)
        ]
        graph.output(())
        step = StepGraph(fx.GraphModule({}, graph), graph.find_nodes(op="placeholder"), {}, [])
        super().__init__(step, rules, None if group is None else Network(graph, group))
        self.given: Given = pytree.tree_unflatten(nodes, spec)
        self.jobs, self.outputs = jobs, list[fx.Node]()
        self.carriers: dict[Any, fx.Node] = {}
        self.refreshes: set[Any] = set()
        self.takes_steps = False
        scales = None if self.given.scales is None else Scales(*self.given.scales)
        self.local = group is not None and any(job.owner is not None for job in jobs)
        if group is not None and not self.local:
            scales = self.insert(over_ranks, scales, self.given.clock, group.size, label="mean over ranks")
        self.scales = scales
        for i, (job, own) in enumerate(zip(jobs, self.given.weights)):
            if self.local and group is not None and job.owner not in (None, group.rank):
                continue
            bias = None if own.bias is None else ("bias", i)
            item = Item(job.name, job.layout, f"{job.name}: update", ("weight", i), bias, own.grad, own.bias)
            item.state, item.scale = dict(own.state), own.scale
            item.stored = dict(item.state)
            item.sizing = job.sizing
            self.items[item.key] = item
            self.refreshes |= {item.key} if job.refresh else set()
            if own.carrier is not None:
                self.carriers[item.key] = own.carrier

    def clock(self, label: str) -> fx.Node:
        return self.given.clock

    def packed_numbers(self) -> fx.Node:
        return self.given.numbers

    def weight(self, key: Any) -> fx.Node:
        part, i = key
        own = self.given.weights[i]
        return own.weight if part == "weight" else own.bias_weight

    def rate(self, key: Any) -> Rate:
        part, i = key
        place = self.jobs[i].places[part == "bias"]
        assert place is not None
        return Rate(self.given.rates, *place, trust=self.jobs[i].sizing.trust)

    def optimizer_numbers(self) -> fx.Node:
        return self.given.rates

    def over_owners(self, parts: Mapping[Any, fx.Node], kind: str, *, label: str) -> list[fx.Node]:
        if not self.local or self.network is None:
            return [*parts.values()]
        like = self.given.weights[0].grad
        dtype = torch.float64 if like.meta["val"].dtype == torch.float64 else torch.float32
        whole = self.insert(total, [*parts.values()], like, dtype, label=label)
        with self.graph.inserting_before(self.step.output):
            return [self.network.sum(whole, kind, "gradients")]

    def spread_directions(self) -> None:
        """Each from its owner."""
        if not self.local or self.network is None:
            return
        with self.graph.inserting_before(self.step.output):
            for i, (job, own) in enumerate(zip(self.jobs, self.given.weights)):
                for part, grad in (("weight", own.grad), ("bias", own.bias)):
                    if grad is not None and job.owner is not None:
                        here = self.directions.get((part, i), grad) if job.owner == self.network.rank else None
                        given = (job.owner, here, grad, self.given.clock, f"{part} of {job.name}")
                        self.directions[part, i] = from_owner(self.network, *given)

    def guard(self) -> fx.Node | None:
        """Where a scaler has found an inf, a direction that is the step itself is no step."""
        if not self.takes_steps or self.scales is None:
            return None
        return self.insert(torch.isfinite, self.scales.gradient, label="loss scale")

    def owners(self) -> list[int | None]:
        """Which weight each input of the program belongs to, by position."""
        paths, _ = pytree.tree_flatten_with_path(self.given)
        owner = {leaf: path[1].idx for path, leaf in paths if getattr(path[0], "name", "") == "weights"}
        return [owner.get(node) for node in self.graph.find_nodes(op="placeholder")]

    def finish(self) -> None:
        """Directions in the order of the weights, each with its bias's, where none was made the gradient; or what a pass has
        given out."""
        made = [] if self.takes_steps or self.outputs else [*self._directions()]
        self.step.output.args = ([*made, *self.outputs],)
        eliminate_dead_code(self.graph)

    def _directions(self) -> Iterator[fx.Node]:
        for i, own in enumerate(self.given.weights):
            yield self.directions.get(("weight", i), own.grad)
            if own.bias is not None:
                yield self.directions.get(("bias", i), own.bias)


def _names(given: Given) -> list[str]:
    """Of the inputs, from the paths of the leaves: ``weights_0_state_L``."""
    paths, _ = pytree.tree_flatten_with_path(given)
    return ["_".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path) for path, _ in paths]


def over_ranks(scales: Scales | None, like: Tensor, size: int) -> Scales:
    """The scale of a rank's own statistics beside those of the mean loss over ``size`` ranks."""
    if scales is None:
        one = torch.ones_like(like, dtype=torch.float32)
        scales = Scales(one, one)
    return scales._replace(statistics=scales.statistics * size)
