"""A program while it is being written: what the passes of the rewrite stage read and fill in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx

from ...ir import StepGraph
from ...prims import accumulation_dtype
from ...rules import Rule
from ...rules.direction import STRIDE
from ...rules.hyper import changing
from ..match.layout import Layout
from ..order.collectives import Network
from ..torch_api.tracing import insert
from .sizing import Sizing
from .vectors import Scales


@dataclass
class Item:
    """One preconditioned weight on its way through a program.

    ``grad`` and ``bias`` are gradients, of all ranks together once they are reduced; ``vectors`` statistics by orientation.
    ``state`` is as it stands at this point of the program, ``stored`` the inputs that it is kept in. ``key`` and
    ``bias_key`` are under which directions are found. ``sizing`` is how long these are; ``scale`` what sizes those that
    are made in the backward.
    """

    name: str
    layout: Layout
    label: str
    key: Any
    bias_key: Any = None
    grad: fx.Node | None = None
    bias: fx.Node | None = None
    state: dict[str, fx.Node] = field(default_factory=dict)
    stored: dict[str, fx.Node] = field(default_factory=dict)
    vectors: dict[int, fx.Node] = field(default_factory=dict)
    scale: fx.Node | None = None
    sizing: Sizing = Sizing(None, False)  # noqa: RUF009  (immutable)


class Rate(NamedTuple):
    """Where the learning rate and the weight decay of a parameter lie in the optimizer's packed ``numbers``; ``trust``: the
    bounds of the ratio by which a step is brought to the size of the weight, None where it is not."""

    numbers: fx.Node
    rate_at: int
    decay_at: int | None
    sign: float
    trust: tuple[float, float] | None = None


class Draft:
    """``rules`` are those that may occur; ``items`` the weights to precondition, ``statistics`` the vectors of every site by
    input position and orientation, ``directions`` what has become of gradients, ``final`` those directions
    that are the step itself; ``writes`` are new values by the input that takes them at the end of the program.

    ``settled`` are writes that do not depend on the guard. ``scales`` say what a loss scaler has left in gradients and
    statistics.
    """

    #: whether the statistics that are written here are used one step late
    sends_late = False
    #: the weights whose statistics are taken, by name; None: all
    due: frozenset[str] | None = None
    #: sites whose statistics are another rank's to take, by input position
    elsewhere: Collection[int] = ()

    def __init__(self, step: StepGraph, rules: Sequence[Rule], network: Network | None = None) -> None:
        self.step, self.rules, self.network = step, rules, network
        self.items: dict[Any, Item] = {}
        self.statistics: dict[int, dict[int, fx.Node]] = {}
        self.directions: dict[Any, fx.Node] = {}
        self.final: set[Any] = set()
        self.writes: dict[fx.Node, fx.Node] = {}
        self.settled: dict[fx.Node, fx.Node] = {}
        self.scales: Scales | None = None
        self._numbers: dict[Rule, dict[str, fx.Node]] = {}
        self._momenta: dict[int, fx.Node] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.step.graph

    def insert(self, function: Callable, *args: Any, label: str) -> Any:
        """Write ``function(*args)`` at the end of the graph."""
        with self.graph.inserting_before(self.step.output):
            return insert(self.graph, function, *args, label=label, pure=True)

    def hand_out(self) -> None:
        """Give every item what there is for it now."""

    # ---- what a door provides -----------------------------------------------------------------------------------------

    def clock(self, label: str) -> fx.Node:
        """The step count that statistics belong to, 0-dim int64."""
        raise NotImplementedError

    def draw(self) -> fx.Node:
        """What random signs are drawn by, 0-dim int64: another one in each step, micro-batch and rank."""
        raise NotImplementedError

    def packed_numbers(self) -> fx.Node:
        """The present values of everything that changes over time in the rules, in the order of :func:`changing_of`."""
        raise NotImplementedError

    def scales_of_statistics(self) -> Scales | None:
        """What statistics and gradients have to be divided by for a refresh."""
        return self.scales

    def refreshed(self, item: Item, new: Mapping[str, fx.Node]) -> None:
        """Take over the state that statistics have made."""
        self.advanced(item, new)

    def advanced(self, item: Item, new: Mapping[str, fx.Node]) -> None:
        """Take over new state of an item, and write it back at the end."""
        self.writes |= {item.stored[name]: node for name, node in new.items() if node is not item.state[name]}
        item.state = dict(new)

    def weight(self, key: Any) -> fx.Node:
        """The parameter whose direction is under ``key``."""
        raise NotImplementedError

    def rate(self, key: Any) -> Rate:
        """How far a direction goes that is the step itself."""
        raise NotImplementedError

    def apply_optimizer(self) -> None:
        """The base optimizer's step on every other parameter, where it is part of the program."""

    def over_owners(self, parts: Mapping[Any, fx.Node], kind: str, *, label: str) -> list[fx.Node]:
        """Numbers, 0-dim, whose sum is the same on all ranks, of one for each gradient or direction that this rank has."""
        return [*parts.values()]

    def spread_directions(self) -> None:
        """Make the directions that this rank has known to all."""

    def guard(self) -> fx.Node | None:
        """Whether the program's writes count, 0-dim; None: always."""
        return None

    def finish(self) -> None:
        """Give the graph its outputs; what nothing reads goes."""
        raise NotImplementedError

    def optimizer_numbers(self) -> fx.Node:
        """The optimizer's numbers, packed."""
        raise NotImplementedError

    def longest(self, item: Item) -> fx.Node | None:
        """How long a step may be that is as long as Adam's, where ``item``'s is."""
        if item.sizing.graft != "adam":
            return None
        rate = self.rate(item.key)
        return self.insert(longest_step, self.weight(item.key), rate.numbers, rate.rate_at, label=item.label)

    # ---- what changes over time ---------------------------------------------------------------------------------------

    def numbers(self, rule: Rule) -> dict[str, fx.Node]:
        """The fields of ``rule`` that change over time, 0-dim each."""
        if not changing(rule):
            return {}
        if not self._numbers:
            packed = self.packed_numbers()
            order = changing_of(self.rules)
            split = self.insert(_each, packed, len(order), label="numbers of the rule")
            for (owner, name), node in zip(order, split):
                self._numbers.setdefault(owner, {})[name] = node
        return self._numbers[rule]


    def numbers_of(self, item: Item) -> dict[str, fx.Node]:
        """As ``numbers``, of an item's rule where it is used; its momentum maybe the optimizer's."""
        found, at = self.numbers(item.layout.rule), item.sizing.momentum_at
        if at is None:
            return found
        if at not in self._momenta:
            self._momenta[at] = self.insert(_entry, self.optimizer_numbers(), at, label="numbers of the optimizer")
        return {**found, "momentum": self._momenta[at]}


def longest_step(weight: Tensor, numbers: Tensor, rate_at: int) -> Tensor:
    """The root mean square of a direction that moves a weight by ``STRIDE`` of its norm at the present rate, 0-dim."""
    wide = accumulation_dtype(weight.dtype)
    rms = weight.to(wide).square().mean().sqrt()
    return STRIDE * rms / numbers[rate_at].to(wide)


def changing_of(rules: Sequence[Rule]) -> list[tuple[Rule, str]]:
    """Every field that changes over time, in order."""
    return [(rule, name) for rule in rules for name in changing(rule)]


def _entry(packed: Tensor, at: int) -> Tensor:
    return packed[at]


def _each(packed: Tensor, size: int) -> list[Tensor]:
    return [packed[i] for i in range(size)]
