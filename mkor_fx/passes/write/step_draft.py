"""The whole training step as a draft: a joint graph, its optimizer, and what they are passed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...rules import Rule
from ...runtime import inputs
from ...runtime.base_step import base_step_of
from ...runtime.optimizer_state import groups_of, numbers_of, place_of_rate
from ...runtime.optimizers import Optimizers
from ..match.layout import Layout
from ..order.collectives import Network
from ..torch_api.backend import FakeTensorMode, eliminate_dead_code
from ..torch_api.capture import WholeStep
from ..torch_api.tracing import add_input, splice
from .delivery import Delivery
from .draft import Draft, Item, Rate, changing_of
from .finite import absolute, all_finite, count_skip, is_taken, norm, of_part, total
from .late_statistics import Buffer
from .sizing import Sizing
from .traced_optimizer import Update, known_update
from .vectors import Scales, of_share


@dataclass(frozen=True)
class Plan:
    """What a whole step is written for, beside its graph.

    ``rules`` are those that may occur, ``params`` by input position, ``trained`` the positions of those that the optimizer
    steps; ``states`` examples of the factors that are kept on this rank, by position. ``buffers`` are the names of the
    inputs that rank 0 decides; ``owners`` the ranks that keep a weight's factors, by name (None: every rank); ``late``
    the buffers of statistics that are used one step late, if this step ``sends`` its own; ``due`` the weights whose
    state is refreshed (None: all). ``local``: a weight's statistics are its owner's own ones, and not summed; ``apart``
    are weights whose gradients every rank has, and whose directions their owners broadcast. ``parts``: the batch is one
    part of several. ``base_rate`` is a ``Hybrid``'s share of the rate. ``updates`` are the optimizers' steps that other
    programs have traced. ``refreshes`` only labels.
    """

    optimizer: Optimizers
    rules: Sequence[Rule]
    params: Mapping[int, nn.Parameter]
    trained: Sequence[int]
    states: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    buffers: Mapping[int, str] = field(default_factory=dict)
    owners: Mapping[str, int | None] = field(default_factory=dict)
    local: bool = False
    apart: Collection[str] = ()
    late: tuple[Buffer, ...] = ()
    sends: bool = False
    due: frozenset[str] | None = None
    rows: bool = False
    clip_norm: float | None = None
    ema: float | None = None
    base_rate: float | None = 1.0
    parts: bool = False
    skip_nonfinite: bool = True
    updates: dict[tuple[int, ...], Update] = field(default_factory=dict)
    refreshes: bool = True


class StepDraft(Draft):
    """``inputs`` lists what the program is passed behind Dynamo's inputs, in order.

    With a ``network`` each rank differentiates its share of the mean loss over ranks, so that gradients and statistics of
    the whole batch are plain sums over ranks. ``gradients`` are by input position; ``sent`` is what leaves for the next
    step, behind ``outputs``.
    """

    step: WholeStep

    def __init__(self, step: WholeStep, plan: Plan, network: Network | None = None) -> None:
        super().__init__(step, plan.rules, network)
        self.sends_late, self.due = plan.sends, plan.due
        self.plan, self.inputs = plan, [inputs.Seed(step.seeds[0].meta["val"].dtype)]
        self._last = step.graph.find_nodes(op="placeholder")[-1]
        self._nodes: dict[inputs.Input, fx.Node] = {self.inputs[0]: step.seeds[0]}
        self.delivery = None
        if network is not None and plan.owners and (row := network.of(network.grid.row)) is not None:
            self.delivery = Delivery(step, row, network.of(network.grid.column), plan.owners, plan.apart)
            if plan.local:
                sites = step.sites.items()
                self.elsewhere = {i for i, site in sites if plan.owners[site.parameter.name] != row.rank}
        self.share: float | fx.Node = 1.0
        self.gradients = {i: step.parameters[i].grad for i in plan.trained}
        self.outputs: list[fx.Node] = [step.returned(position) for position in step.results]
        self.results = len(self.outputs)
        self.sent: list[fx.Node] = []
        self.taken: fx.Node | None = None  # with late statistics: whether the step that has sent them was taken
        self.update: Update | None = None
        self.writes |= {target: step.returned(at) for target, at in step.mutations}
        self._keep: fx.Node | None = None
        self.norm: fx.Node | None = None  # of all gradients, where they are clipped
        self._groups = groups_of(plan.optimizer)
        for index, state in plan.states.items():
            self._add_item(index, state)

    def _add_item(self, index: int, state: Mapping[str, Tensor]) -> None:
        site = self.step.sites[index]
        name, bias = site.parameter.name, None if site.bias is None else site.bias.index
        label = f"{name}: {'refresh and ' if self.plan.refreshes else ''}precondition"
        item = Item(name, Layout.of(site), label, index, bias)
        item.state = {key: self.input(inputs.Factor(index, key), example) for key, example in state.items()}
        item.stored = dict(item.state)
        item.sizing = self._sizing(index)
        self.items[index] = item
        self.hand_out()

    def hand_out(self) -> None:
        """Give every item what there is for it now: gradients and statistics."""
        for index, item in self.items.items():
            item.grad = self.gradients.get(index)
            item.bias = None if item.bias_key is None else self.gradients.get(item.bias_key)
            item.vectors = self.statistics.get(index, {})

    # ---- inputs -------------------------------------------------------------------------------------------------------

    def input(self, source: inputs.Input, example: Tensor) -> fx.Node:
        """The placeholder that is passed what ``source`` fetches, shaped as ``example``."""
        if source not in self._nodes:
            with self.graph.inserting_after(self._last):
                self._last = self._nodes[source] = add_input(self.graph, source.name, example, self._fake_mode)
            self.inputs.append(source)
        return self._nodes[source]

    def replace_seed(self, value: fx.Node) -> None:
        """Write the loss's gradient into the program: it is no input any more."""
        (seed,) = self.step.seeds
        seed.replace_all_uses_with(value)
        source = next(source for source, node in self._nodes.items() if node is seed)
        self.inputs.remove(source)
        del self._nodes[source]
        if seed is self._last:
            self._last = seed.prev
        self.graph.erase_node(seed)
        self.step.seeds = [value]

    @property
    def _fake_mode(self) -> FakeTensorMode:
        return next(iter(self.step.parameters.values())).node.meta["val"].fake_mode

    @property
    def device(self) -> torch.device:
        return next(iter(self.step.parameters.values())).node.meta["val"].device

    def scalar(self, source: inputs.Input, dtype: torch.dtype, *shape: int) -> fx.Node:
        """An input of a few numbers."""
        return self.input(source, torch.empty(shape, dtype=dtype, device=self.device))

    def clock(self, label: str) -> fx.Node:
        steps = self.scalar(inputs.Steps(), torch.int64)
        return steps if self.taken is None else self.insert(torch.sub, steps, 1, label=label)

    def draw(self) -> fx.Node:
        return self.scalar(inputs.Draw(), torch.int64)

    def packed_numbers(self) -> fx.Node:
        return self.scalar(inputs.RuleNumbers(), torch.float64, len(changing_of(self.rules)))

    # ---- state --------------------------------------------------------------------------------------------------------

    def scales_of_statistics(self) -> Scales | None:
        """A rank differentiates its share of the loss; statistics of its rows alone are those of its own loss."""
        if self.delivery is None or not self.plan.local:
            return self.scales
        return self.insert(of_share, self.share, self.outputs[0], label="share of the batch")

    def refreshed(self, item: Item, new: Mapping[str, fx.Node]) -> None:
        """State of late statistics counts where the step that sent them does. That of this step's own where it does itself,
        and what reads it reads it in the place of the old one; among ranks that would wait for the last gradient."""
        if (counts := self.guard() if self.taken is None and self.network is None else self.taken) is None:
            return self.advanced(item, new)
        for name, old in item.state.items():
            if new[name] is not old:
                item.state[name] = self.insert(torch.where, counts, new[name], old, label=item.label)
                self.settled[item.stored[name]] = item.state[name]
        return None

    def _group(self, index: int) -> int:
        return self._groups[id(self.plan.params[index])]

    def _sizing(self, index: int) -> Sizing:
        rule = self.step.sites[index].rule
        assert rule is not None
        return Sizing.of(rule, base_step_of(self.plan.optimizer, self._group(index)))

    def share_of_rate(self, index: int) -> float:
        """Of a step that the base optimizer takes in the place of the rule of the weight at ``index``."""
        return self._sizing(index).share_of_rate(self.plan.base_rate)

    def warmth(self) -> fx.Node:
        """How far the base optimizer has taken over from the rules, 0-dim."""
        return self.scalar(inputs.Warmth(), torch.float64)

    def parts(self) -> dict[tuple, fx.Node]:
        """What adds up over the parts of a batch, by key: its share of the loss, gradients, statistics of this rank."""
        found = {("loss",): self.insert(of_part, self.outputs[0], self.share_of_batch(), label="loss")}
        found |= {("gradient", i): grad for i, grad in self.gradients.items() if grad is not None}
        return found | {("statistics", i, k): v for i, own in self.statistics.items() for k, v in own.items()}

    def sum_of(self, key: tuple, like: fx.Node) -> fx.Node:
        """Of the parts before this one."""
        value = like.meta["val"]
        return self.input(inputs.Sum(key, tuple(value.shape), value.dtype), value)

    def share_of_batch(self) -> fx.Node:
        return self.scalar(inputs.Share(), torch.float64)

    def over_owners(self, parts: Mapping[Any, fx.Node], kind: str, *, label: str) -> list[fx.Node]:
        if self.delivery is None:
            return [*parts.values()]
        owned = {*self.delivery.owner, *(self.delivery.apart if kind == "products" else ())}
        own = [part for key, part in parts.items() if key in owned]
        dtype = torch.float64 if torch.float64 in self.delivery.dtypes else torch.float32
        whole = self.insert(total, own, self.outputs[0], dtype, label=label)
        with self.graph.inserting_before(self.step.output):
            summed = self.delivery.row.sum(whole, kind, "gradients")
        return [*(part for key, part in parts.items() if key not in owned), summed]

    def spread_directions(self) -> None:
        if self.delivery is None:
            return
        compressed = self.delivery.row.buckets.compress is not None
        clock = self.scalar(inputs.Steps(), torch.int64) if compressed else None
        self.directions |= self.delivery.from_owners(self.directions, clock)
        for index, site in self.step.sites.items():
            if site.rule is not None and self._sizing(index).final:
                self.final |= {index, *([] if site.bias is None else [site.bias.index])}

    # ---- the optimizer ------------------------------------------------------------------------------------------------

    def weight(self, key: Any) -> fx.Node:
        return self.step.parameters[key].node

    def optimizer_numbers(self) -> fx.Node:
        return self.scalar(inputs.Numbers(), torch.float64, len(numbers_of(self.plan.optimizer)))

    def rate(self, key: Any) -> Rate:
        place = place_of_rate(self.plan.optimizer, self._group(key))
        sites = self.step.sites.items()
        own = next(index for index, site in sites if key == index or (site.bias is not None and key == site.bias.index))
        return Rate(self.optimizer_numbers(), *place, trust=self._sizing(own).trust)

    def apply_optimizer(self) -> None:
        order = [i for i in self.plan.trained if i not in self.final]
        if not order:
            return
        self.update = update = known_update(self.plan.updates, self.plan.optimizer, [self.plan.params[i] for i in order])
        states = [(i, key, example) for i, state in zip(order, update.states) for key, example in state.items()]
        state = [self.input(inputs.Optimizer(i, key), example) for i, key, example in states]
        state += [self.input(inputs.Counter(*place), example) for place, example in update.counters.items()]
        params = [self.weight(i) for i in order]
        directions = [self.directions[i] if i in self.directions else self.gradients[i] for i in order]
        packed = self.optimizer_numbers()
        with self.graph.inserting_before(self.step.output):
            new = splice(self.graph, update.module, [*params, *directions, *state, packed], "optimizer")
        self.writes |= dict(zip([*params, *state], new))

    def owners(self) -> list[int | None]:
        """To the update of which weight each input of the program belongs, by position; that of a bias to its weight's."""
        layer = {i: i for i in self.step.parameters}
        layer |= {site.bias.index: index for index, site in self.step.sites.items() if site.bias is not None}
        index_of = {node: layer.get(getattr(source, "index", None)) for source, node in self._nodes.items()}
        index_of |= {parameter.node: layer[i] for i, parameter in self.step.parameters.items()}
        return [index_of.get(node) for node in self.graph.find_nodes(op="placeholder")]

    # ---- the end ------------------------------------------------------------------------------------------------------

    def guard(self) -> fx.Node | None:
        """Whether loss and gradients are finite."""
        if not self.plan.skip_nonfinite:
            return None
        if self._keep is None:
            label = "skip_nonfinite"
            counter = self.scalar(inputs.Skipped(), torch.int64)
            norms = self._norms(label) if self.norm is None else [self.norm]
            checked = [self.insert(absolute, self.outputs[0], label=label), *norms]
            self._keep = self.insert(all_finite, checked, label=label)
            self.settled[counter] = self.insert(count_skip, counter, self._keep, label=label)
        return self._keep

    def _norms(self, label: str) -> list[fx.Node]:
        """Of all gradients; were those of owners' ones not summed over ranks, ranks would decide apart."""
        norms = {i: self.insert(norm, grad, label=label) for i, grad in self.gradients.items()}
        return self.over_owners(norms, "norms", label=label)

    def finish(self) -> None:
        """The plain outputs; behind them whether this step counts, and what it has sent."""
        sent = []
        if self.sent:
            keep = self.guard()
            sent = [self.insert(is_taken, self.outputs[0], label="late") if keep is None else keep, *self.sent]
        self.step.output.args = ([*self.outputs, *sent],)
        self.step.output.meta.pop("desc", None)
        eliminate_dead_code(self.graph)
