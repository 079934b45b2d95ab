"""Turn a joint graph into a training step: statistics, refresh, preconditioning, optimizer, writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..prims import accumulation_dtype
from ..rules import Rule
from .capture import WholeStep
from .collectives import Network
from .finite import absolute, all_finite, count_skip, is_taken, norm, total
from .late import Buffer, arrived, nothing, send
from .optimizer import Update
from .owners import Delivery
from .rewrite import Layout, update_site, write_statistics
from .trace import insert, shaped_like, splice

aten = torch.ops.aten


@dataclass(frozen=True)
class Slot:
    """An input of the compiled step beside those of Dynamo's graph: whose tensor the runtime passes there.

    ``kind`` is "step", "numbers", "rows", "skipped", "late", "factor" or "optimizer"; the last two are of the parameter at
    ``index``; "late" is what the last step has sent, by position.
    """

    kind: str
    index: int | None = None
    key: str = ""

    @property
    def name(self) -> str:
        return f"mkor_{self.kind}" + ("" if self.index is None else f"_{self.index}_{self.key}")


class StepWriter:
    """Writes one variant of the training step into a joint graph. ``slots`` lists the inputs it has added, in order.

    With a ``network`` each rank differentiates its share of the mean loss over ranks, so that gradients and statistics of
    the whole batch are plain sums over ranks. ``buffers`` are the names of the inputs that rank 0 decides, ``owners`` the
    ranks that keep a weight's factors, by name (None: every rank).
    """

    def __init__(
        self,
        step: WholeStep,
        network: Network | None = None,
        buffers: Mapping[int, str] | None = None,
        owners: Mapping[str, int | None] | None = None,
    ) -> None:
        self.step, self.network = step, network
        self.delivery = None if network is None or not owners else Delivery(step, network, owners)
        self.buffers = {step.inputs[index]: name for index, name in (buffers or {}).items()}
        self.gradients: dict[int, fx.Node] = {}
        self.share: float | fx.Node = 1.0
        self.slots: list[Slot] = []
        self.writes: list[tuple[fx.Node, fx.Node]] = [(target, step.returned(at)) for target, at in step.mutations]
        self.taken: fx.Node | None = None  # with late statistics: whether the step that has sent them was taken
        self.sent: list[fx.Node] = []
        self.results = len(step.results)
        self._settled: list[tuple[fx.Node, fx.Node]] = []
        self._last = step.graph.find_nodes(op="placeholder")[-1]

    def input(self, slot: Slot, example: Tensor) -> fx.Node:
        """A new placeholder for ``slot``, shaped as ``example``."""
        with self.step.graph.inserting_after(self._last):
            self._last = self.step.graph.placeholder(slot.name)
        fake_mode = next(iter(self.step.parameters.values())).node.meta["val"].fake_mode
        with torch.no_grad(), fake_mode:
            self._last.meta["val"] = shaped_like(example)
        self.slots.append(slot)
        return self._last

    def seed(self, rows: Tensor | None = None) -> None:
        """The gradient of the mean loss over ranks with respect to this rank's: one without a network.

        Ranks weigh the same, or each by its number of ``rows``, 0-dim.
        """
        (seed,) = self.step.seeds
        value = seed.meta["val"]
        count = None if rows is None or self.network is None else self.input(Slot("rows"), rows)
        first = next(n for n in self.step.graph.nodes if n.op != "placeholder")
        with self.step.graph.inserting_before(first):
            if count is not None:
                total = self.network.sum(count, "rows", "the batch")
                share = insert(self.step.graph, share_of, count, total, value.dtype, label="share of the batch")
                self.share = share
            else:
                self.share = 1.0 if self.network is None else 1.0 / self.network.size
                kind = {"dtype": value.dtype, "device": value.device}
                share = self.step.graph.call_function(aten.full.default, ([], self.share), kind)
                share.meta["val"] = value
        seed.replace_all_uses_with(share)
        if seed is self._last:
            self._last = seed.prev
        self.step.graph.erase_node(seed)
        self.step.seeds = [share]

    def take_gradients(self, indices: Collection[int]) -> dict[int, fx.Node]:
        """The gradients of the parameters at ``indices``, of all ranks together; not those that other ranks own."""
        for i in indices:
            parameter = self.step.parameters[i]
            if i in self.owned:
                continue
            self.gradients[i] = parameter.grad
            if self.network is not None:
                with self.step.graph.inserting_before(self.step.output):
                    self.gradients[i] = self.network.sum(parameter.grad, "gradient", parameter.name)
        if self.delivery is not None:
            self.gradients |= self.delivery.to_owners()
        return dict(self.gradients)

    @property
    def owned(self) -> Collection[int]:
        """The input positions of parameters that have an owner."""
        return () if self.delivery is None else self.delivery.owner

    def statistics(
        self, rule: Rule, collect: bool, refresh: bool, late: tuple[Buffer, ...] = ()
    ) -> dict[int, dict[int, fx.Node]]:
        """What this step refreshes from: each site's statistics vectors by orientation, of all ranks together.

        With ``late`` buffers they are the last step's, and this step's own leave for the next one.
        """
        graph = self.step.graph
        vectors: dict[int, dict[int, fx.Node]] = {}
        with graph.inserting_before(self.step.output):
            for index, site in self.step.sites.items() if collect else ():
                dtype = accumulation_dtype(site.parameter.node.meta["val"].dtype)
                vectors[index] = write_statistics(graph, rule, site, dtype)
                if self.network is not None and not late:
                    name = site.parameter.name
                    vectors[index] = {k: self.network.sum(v, "statistics", name) for k, v in vectors[index].items()}
        if not late:
            return vectors
        if refresh:
            device = next(iter(self.step.parameters.values())).node.meta["val"].device
            self.taken, *inputs = (self.input(Slot("late", i), t) for i, t in enumerate(nothing(late, device)))
        with graph.inserting_before(self.step.output):
            self.sent = send(graph, self.network, late, vectors) if collect else []
            return arrived(graph, self.network, late, inputs) if refresh else {}

    def precondition(
        self,
        rule: Rule,
        refresh: bool,
        states: dict[int, dict[str, Tensor]],
        statistics: Mapping[int, dict[int, fx.Node]],
        step: Tensor,
    ) -> dict[int, fx.Node]:
        """The directions of sites and their biases, by input position. ``states`` are those that this rank keeps."""
        graph, output = self.step.graph, self.step.output
        directions: dict[int, fx.Node] = {}
        step_node = self.input(Slot("step"), step)
        for index, site in self.step.sites.items():
            if index not in states:
                continue
            state = {key: self.input(Slot("factor", index, key), t) for key, t in states[index].items()}
            with graph.inserting_before(output):
                name = site.parameter.name
                label = f"{name}: {'refresh and ' if refresh else ''}precondition"
                count = step_node if self.taken is None else insert(graph, torch.sub, step_node, 1, label=label)
                directions[index], bias_direction, new = insert(
                    graph,
                    update_site,
                    rule,
                    Layout.of(site),
                    refresh,
                    self.gradients[index],
                    self.gradients[site.bias.index] if site.bias is not None else None,
                    statistics.get(index, {}) if refresh else {},
                    state,
                    count,
                    label=label,
                )
            if site.bias is not None:
                directions[site.bias.index] = bias_direction
            if refresh and self.taken is None:
                self.writes += [(state[key], new[key]) for key in state]
            elif refresh:
                with graph.inserting_before(output):
                    kept = {
                        key: insert(graph, torch.where, self.taken, new[key], state[key], label=label) for key in state
                    }
                self._settled += [(state[key], kept[key]) for key in state]
        return directions if self.delivery is None else {**directions, **self.delivery.from_owners(directions)}

    def apply(
        self, update: Update, directions: dict[int, fx.Node], states: dict[int, dict[str, Tensor]], numbers: Tensor
    ) -> None:
        """The optimizer's own step on the directions."""
        graph = self.step.graph
        order = list(states)
        state = [self.input(Slot("optimizer", i, key), t) for i in order for key, t in states[i].items()]
        packed = self.input(Slot("numbers"), numbers)
        params = [self.step.parameters[i].node for i in order]
        with graph.inserting_before(self.step.output):
            new = splice(graph, update.module, [*params, *(directions[i] for i in order), *state, packed], "optimizer")
        self.writes += list(zip([*params, *state], new))

    def finish(self, skip_nonfinite: bool, skipped: Tensor) -> None:
        """Write everything back, or nothing where the loss or a gradient is not finite; return the plain outputs.

        Late statistics belong to the step before and refresh anyway; behind the outputs go whether this step counts and
        what it has sent.
        """
        graph, step = self.step.graph, self.step
        outputs = [step.returned(position) for position in step.results]
        if self.network is not None:
            with graph.inserting_before(step.output):
                own = insert(graph, weighted, outputs[0], self.share, label="loss")
                outputs[0] = self.network.sum(own, "loss", "loss")
                for i, (target, new) in enumerate(self.writes):
                    if target in self.buffers:
                        self.writes[i] = (target, self.network.of_first_rank(new, "buffer", self.buffers[target]))
        counter = self.input(Slot("skipped"), skipped) if skip_nonfinite else None
        with graph.inserting_before(step.output):
            if skip_nonfinite:
                checked = [insert(graph, absolute, outputs[0], label="skip_nonfinite"), *self._norms()]
                keep = insert(graph, all_finite, checked, label="skip_nonfinite")
                self.writes = [
                    (t, insert(graph, torch.where, keep, v, t, label="skip_nonfinite")) for t, v in self.writes
                ]
                self.writes.append((counter, insert(graph, count_skip, counter, keep, label="skip_nonfinite")))
            if self.sent:
                sent = [keep if skip_nonfinite else insert(graph, is_taken, outputs[0], label="late"), *self.sent]
            for target, value in self.writes + self._settled:
                if value is not target:
                    copy = graph.call_function(aten.copy_.default, (target, value))
                    copy.meta = {"val": target.meta["val"], "mkor_fx": "write"}
        step.output.args = ([*outputs, *(sent if self.sent else [])],)
        step.output.meta.pop("desc", None)
        graph.eliminate_dead_code()

    def _norms(self) -> list[fx.Node]:
        """Of all gradients; those of owners' ones are summed over ranks, or ranks would decide apart."""
        graph, label = self.step.graph, "skip_nonfinite"
        norms = {i: insert(graph, norm, grad, label=label) for i, grad in self.gradients.items()}
        if self.delivery is None:
            return [*norms.values()]
        kind = torch.float64 if torch.float64 in self.delivery.dtypes else torch.float32
        loss = self.step.returned(self.step.results[0])
        own = insert(graph, total, [norms.pop(i) for i in self.owned if i in norms], loss, kind, label=label)
        return [*norms.values(), self.network.sum(own, "norms", "gradients")]


def share_of(rows: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    return (rows / total).to(dtype)


def weighted(loss: Tensor, share: Tensor | float) -> Tensor:
    return loss.detach() * share
