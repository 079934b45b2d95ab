"""How one weight is stored, used and preconditioned: what its update has to know beside the tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ir import INPUTS_FIRST, INPUTS_LAST, Site, View
from ...kinds import Kind
from ...rules import Gradient, Rule, Shape
from ...rules.hyper import describe_rule, timeless
from ...rules.results import check_sides, too_few_slots

#: shapes of what rules make of a use, by what they depend on; so many are kept
_summaries: dict[tuple, list[torch.Size]] = {}
KEPT = 1024


@dataclass(frozen=True)
class Layout:
    """``kinds`` are the orientations in which the weight is used; ``bias`` whether its bias is matched; ``lookup``
    whether it is only ever looked up.
    """

    rule: Rule
    view: View
    kinds: tuple[int, ...]
    bias: bool
    lookup: bool = False

    @classmethod
    def of(cls, site: Site) -> Layout:
        assert site.rule is not None, f"{site.parameter.name} has no rule"
        return cls(site.rule, site.view, site.kinds, site.bias is not None, site.lookup)

    @property
    def members(self) -> int | None:
        """How many matrices a batched weight consists of, None for one that is a matrix."""
        return self.view.matrix[0] if len(self.view.matrix) == 3 else None

    @property
    def stored_inputs_first(self) -> bool:
        """``[I, O]`` in memory; a weight used both ways counts as ``[O, I]``."""
        return self.kinds == (INPUTS_FIRST,)

    @property
    def shape(self) -> Shape:
        """Of one matrix."""
        return self.shape_of_use(self.kinds[0])

    def shape_of_use(self, kind: int) -> Shape:
        """The matrix as a use in this orientation sees it."""
        outputs, inputs = self.view.matrix[-2:] if kind == INPUTS_LAST else self.view.matrix[:-3:-1]
        opposite = kind != self.kinds[0]
        return Shape(outputs, inputs, self.bias and not opposite, self.lookup, opposite)

    def orient(self, grad: Tensor, bias: Tensor | None) -> Gradient:
        """A gradient as stored -> ``[O, I]`` as rules see it, ``[E, O, I]`` for a batched weight."""
        matrix = self.view.see(grad)
        if bias is not None:
            bias = bias.reshape([*matrix.shape[:-2], -1])
        return Gradient(matrix.transpose(-1, -2) if self.stored_inputs_first else matrix, bias)

    def store(self, direction_OI: Tensor, shape: torch.Size) -> Tensor:
        """``[O, I]`` -> the parameter's own shape."""
        return self.view.store(direction_OI.transpose(-1, -2) if self.stored_inputs_first else direction_OI, shape)

    def each(self, function: Callable) -> Callable:
        """``function`` of one matrix on every member: rules see one at a time."""
        return function if self.members is None else torch.vmap(function)

    @cached_property
    def trace_key(self) -> tuple:
        """What a trace of code that is passed this layout depends on: not the numbers that change, nor what makes them.
        Values go with their types, since 1 equals True."""
        rule: Any = timeless(self.rule)
        return replace(self, rule=rule), *(type(getattr(rule, field.name)) for field in fields(rule))

    # ---- state --------------------------------------------------------------------------------------------------------

    def fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        """What the rule starts from, of each member."""
        with _alike_everywhere(device):
            state = self.rule.at_first_step.init(self.shape, device)
        if self.members is not None:
            state = {name: t.expand(self.members, *t.shape) for name, t in state.items()}
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}

    @property
    def joint(self) -> bool:
        """Whether weight and bias are one matrix."""
        return self.bias and self.rule.joint_bias

    @cached_property
    def sides(self) -> tuple[str | None, str | None]:
        """Which entries of the state stand on the left and on the right of a gradient: '' for what is computed of several,
        None for the identity."""
        state = self.rule.at_first_step.init(self.shape, torch.device("meta"))
        if self.rule.overrides("precondition"):
            return "", ""
        with torch.device("meta"):
            found = self.rule.at_first_step.sides(state)
        check_sides(self.rule, found, torch.empty(self.shape.O, self.shape.I + self.joint, device="meta"))
        names = {id(t): name for name, t in state.items()}
        return tuple(None if side is None else names.get(id(side), "") for side in found)  # type: ignore[return-value]

    def kind(self, key: str) -> Kind | None:
        """What the state tensor ``key`` is."""
        return self.rule.kinds.get(key)

    # ---- statistics ---------------------------------------------------------------------------------------------------

    def summary_shapes(self, kind: int) -> list[torch.Size]:
        """Shapes of what the rule's ``summarize`` returns for a use of one matrix, found once for layouts that are alike."""
        key = self.trace_key, kind
        if key not in _summaries:
            if len(_summaries) == KEPT:
                del _summaries[next(iter(_summaries))]
            _summaries[key] = self._summary_shapes(kind)
        return _summaries[key]

    def _summary_shapes(self, kind: int) -> list[torch.Size]:
        shape, rule = self.shape_of_use(kind), self.rule.at_first_step
        with torch.device("meta"):
            rows = torch.empty(1, shape.I), torch.empty(1, shape.O)
            also: dict[str, Any] = {"state": rule.init(self.shape, torch.device("meta"))} if rule.reads_state else {}
            also |= {"key": torch.empty((), dtype=torch.int64)} if rule.draws else {}
            return [s.shape for s in rule.summarize(shape, *rows, **also)]

    def vector_size(self, kind: int) -> int:
        """Numbers in the statistics of one orientation: each member's flat summary and the number of rows behind it."""
        return (sum(shape.numel() for shape in self.summary_shapes(kind)) + 1) * (self.members or 1)

    @property
    def statistics_size(self) -> int:
        """The longer of the two statistics vectors that there can be: another graph may add the other orientation."""
        return max(map(self.vector_size, self.kinds if self.lookup else (INPUTS_LAST, INPUTS_FIRST)))

    @property
    def reads_state(self) -> bool:
        """Whether statistics depend on the state."""
        return self.rule.reads_state

    @property
    def slots(self) -> int | None:
        """For how many micro-batches of a step a summary has slots; None: it has none, and needs none."""
        return None if self.rule.gathers is None else self.rule.gathers[1]

    def shared_slot(self, name: str, written: int) -> ValueError:
        """What is to be raised where of the micro-batches that were ``written`` two have come to one slot."""
        assert self.slots is not None
        if written > self.slots:
            return ValueError(f"{name}: {too_few_slots(self.rule, 'micro-batches of a step', self.slots, written)}")
        return ValueError(
            f"{name}: {written} micro-batches, and two in one of the {self.slots} slots of "
            f"{describe_rule(self.rule)}: between "
            "them lay a call without a backward (make it under torch.no_grad()), a step that left the weight out, or "
            "a call of "
            "another handle"
        )

    @property
    def layout(self) -> Layout:
        return self

    #: entries of the state that are not the rule's
    not_the_rules: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class SizedLater:
    """The state of a weight whose directions get their size from the step before: its rule's, and ``scale``, which brings
    weight and bias direction to that size, ``[2]`` each matrix."""

    layout: Layout
    dtype: torch.dtype
    not_the_rules: ClassVar[tuple[str, ...]] = ("scale",)

    def fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        size, state = (2,) if self.layout.members is None else (self.layout.members, 2), self.layout.fresh_state(device)
        if "scale" in state:
            raise ValueError(
                f"{type(self.layout.rule).__name__} has a state named 'scale', which is the library's own name with "
                "precondition='backward': call it otherwise"
            )
        return {**state, "scale": torch.ones(size, dtype=self.dtype, device=device)}

    def kind(self, key: str) -> Kind | None:
        return self.layout.kind(key)


@contextlib.contextmanager
def _alike_everywhere(device: torch.device) -> Iterator[None]:
    """Random numbers that are the same on every rank, and leave the user's generators as they are."""
    if device.type not in ("cpu", "cuda"):
        yield
        return
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def merge_layouts(first: Layout, second: Layout, bias: bool) -> Layout | None:
    """One weight in two graphs: both orientations, with a ``bias`` or without; None where they do not agree."""
    if (first.rule, first.view, first.lookup) != (second.rule, second.view, second.lookup):
        return None
    kinds = tuple(sorted({*first.kinds, *second.kinds}))
    return Layout(first.rule, first.view, kinds, bias, first.lookup)
