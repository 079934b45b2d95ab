"""Write statistics and the rule's update into a graph. Both doors write the same code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .. import reasons
from ..ir import INPUTS_FIRST, INPUTS_LAST, Decline, Operand, Site, StepGraph, Tap, View
from ..rules import Gradient, Rule, Shape, Use
from .core import graph_pass
from .trace import insert


@dataclass(frozen=True)
class Layout:
    """How one parameter is stored and used: what the update has to know beside the tensors.

    ``kinds`` are the orientations in which it is used; ``bias`` whether its bias is matched; ``lookup`` whether it is only
    ever looked up.
    """

    view: View
    kinds: tuple[int, ...]
    bias: bool
    lookup: bool = False

    @classmethod
    def of(cls, site: Site) -> Layout:
        return cls(site.view, site.kinds, site.bias is not None, site.lookup)

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
        return Shape(outputs, inputs, self.bias and kind == self.kinds[0], self.lookup)

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

    def fresh_state(self, rule: Rule) -> Callable[[torch.device], dict[str, Tensor]]:
        return partial(self._fresh, rule)

    def _fresh(self, rule: Rule, device: torch.device) -> dict[str, Tensor]:
        state = rule.init(self.shape, device)
        if self.members is None:
            return state
        return {name: t.expand(self.members, *t.shape).clone() for name, t in state.items()}

    def fresh_state_with_scale(self, rule: Rule, dtype: torch.dtype) -> Callable[[torch.device], dict[str, Tensor]]:
        """With the ``scale`` that brings weight and bias direction to the last step's gradient norms, ``[2]`` each."""
        size = (2,) if self.members is None else (self.members, 2)
        return lambda device: {**self._fresh(rule, device), "scale": torch.ones(size, dtype=dtype, device=device)}

    def statistics_size(self, rule: Rule) -> int:
        """Numbers in one statistics vector: each member's flat summary and the number of rows behind it."""
        kinds = self.kinds if self.lookup else (INPUTS_LAST, INPUTS_FIRST)  # another graph may add the other one
        sizes = [sum(s.numel() for s in summary_shapes(rule, self.shape_of_use(kind))) for kind in kinds]
        return (max(sizes) + 1) * (self.members or 1)


@graph_pass(stage="match", exact=True)
def decline_by_rule(step: StepGraph, *, rule: Rule) -> None:
    """A weight for which the rule keeps no state is declined with its bias; so is a bias that the rule leaves alone."""
    for index, site in list(step.sites.items()):
        shape = Layout.of(site).shape
        name, weight, bias = type(rule).__name__, site.parameter.name, site.bias
        if not rule.init(shape, torch.device("meta")):
            del step.sites[index]
            reason = reasons.TOO_LARGE.format(rule=name, O=shape.O, I=shape.I)
            step.declines[index] = Decline(reason, str(site.taps[0].node.target))
            if bias is not None:
                step.declines[bias.index] = Decline(reasons.WEIGHT_DECLINED.format(weight=weight))
        elif bias is not None and not rule.preconditions_bias(shape):
            site.bias = None
            step.declines[bias.index] = Decline(reasons.BIAS_ALONE.format(rule=name, weight=weight))


def merge_layouts(first: Layout, second: Layout) -> Layout | None:
    """One weight in two graphs: both orientations, and its bias if it is that in both; None where they do not agree."""
    if (first.view, first.lookup) != (second.view, second.lookup):
        return None
    kinds = tuple(sorted({*first.kinds, *second.kinds}))
    return Layout(first.view, kinds, first.bias and second.bias, first.lookup)


class Scales(NamedTuple):
    """What a loss scaler has left in the statistics and in the gradient, 0-dim each; not finite: touch nothing."""

    statistics: Tensor
    gradient: Tensor


def summary_shapes(rule: Rule, shape: Shape) -> list[torch.Size]:
    """Shapes of what ``rule.summarize`` returns for a use of one matrix."""
    with torch.device("meta"):
        return [s.shape for s in rule.summarize(shape, torch.empty(1, shape.I), torch.empty(1, shape.O))]


def summarize_use(
    rule: Rule,
    layout: Layout,
    kind: int,
    a_view: Callable,
    a: tuple,
    g_view: Callable,
    g: tuple,
    count: Any,
    dtype: torch.dtype,
) -> Tensor:
    """One use's statistics vector, ``[S]``: of each member the flat summary, then the number of rows."""
    a_NI, g_NO = a_view(*a), g_view(*g)
    if count is None:
        rows = torch.ones_like(g_NO[..., 0], dtype=dtype).sum(-1)
    else:
        rows = count[0](*count[1:]).to(dtype).expand(g_NO.shape[:-2])
    summary = layout.each(partial(rule.summarize, layout.shape_of_use(kind)))(a_NI, g_NO)
    flat = [s.reshape([*rows.shape, -1]).to(dtype) for s in summary]
    return torch.cat([*flat, rows.unsqueeze(-1)], -1).flatten()


def write_statistics(graph: fx.Graph, rule: Rule, site: Site, dtype: torch.dtype) -> dict[int, fx.Node]:
    """Insert the statistics vector of each orientation in which the site's weight is used."""
    label = f"{site.parameter.name}: statistics"
    vectors: dict[int, fx.Node] = {}
    layout = Layout.of(site)
    for tap in site.taps:
        assert tap.inputs is not None
        vector = _write_use(graph, rule, layout, tap, dtype, label)
        known = vectors.get(tap.inputs)
        vectors[tap.inputs] = vector if known is None else insert(graph, torch.add, known, vector, label=label)
    return vectors


def _write_use(graph: fx.Graph, rule: Rule, layout: Layout, tap: Tap, dtype: torch.dtype, label: str) -> fx.Node:
    def spread(operand: Operand) -> tuple:
        return (operand.node, *operand.arguments)

    count = None if tap.count is None else (tap.count.view, *spread(tap.count))
    a, g = tap.a, tap.g
    operands = a.view, spread(a), g.view, spread(g)
    return insert(graph, summarize_use, rule, layout, tap.inputs, *operands, count, dtype, label=label)


def update_site(
    rule: Rule,
    layout: Layout,
    refresh: bool,
    grad: Tensor,
    bias_grad: Tensor | None,
    vectors: dict[int, Tensor],
    state: dict[str, Tensor],
    step: Tensor,
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """The whole update of one parameter: ``(direction, bias direction, new state)``.

    ``vectors`` are the statistics by orientation. State is refreshed before it preconditions, and stays as it was where a
    statistic is not finite.
    """
    gradients = layout.orient(grad, bias_grad)
    finite = _finite(rule, gradients, vectors) if refresh else None
    if refresh and scales is not None:
        finite = finite & torch.isfinite(scales.statistics) & torch.isfinite(scales.gradient)

    def member(
        state: dict[str, Tensor], gradients: dict[str, Tensor], summaries: dict[int, list[Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if refresh:
            read = Gradient(**gradients)
            if scales is not None:
                read = Gradient(**{name: g / scales.gradient.to(g.dtype) for name, g in gradients.items()})
            uses = uses_of(rule, layout, summaries, scales)
            state = refreshed(rule, state, uses, read, step, finite)
        return rule.precondition(state, Gradient(**gradients)).tensors(), state

    summaries = split_statistics(rule, layout, vectors)
    directions, state = layout.each(member)(state, gradients.tensors(), summaries)
    bias = None if bias_grad is None else directions["bias"].reshape(bias_grad.shape)
    return layout.store(directions["weight"], grad.shape), bias, state


def refreshed(
    rule: Rule, state: dict[str, Tensor], uses: list[Use], grad: Gradient, step: Tensor, finite: Tensor
) -> dict[str, Tensor]:
    """New state of one matrix; as it was where a statistic is not finite, or no row was seen."""
    updated = rule.update(state, uses, grad, step)
    keep = finite & (sum((use.rows for use in uses[1:]), uses[0].rows) > 0)
    return {name: torch.where(keep, updated[name], old) for name, old in state.items()}


def _finite(rule: Rule, grad: Gradient, vectors: dict[int, Tensor]) -> Tensor:
    checks = [torch.isfinite(vector).all() for vector in vectors.values()]
    if rule.reads_gradient:
        checks += [torch.isfinite(g).all() for g in grad.tensors().values()]
    finite = checks[0]
    for check in checks[1:]:
        finite = finite & check
    return finite


def split_statistics(rule: Rule, layout: Layout, vectors: dict[int, Tensor]) -> dict[int, list[Tensor]]:
    """Statistics vectors as each orientation's summary with the number of rows behind it, ``[E, ...]`` if batched."""
    split = {}
    for kind, vector in vectors.items():
        shapes = summary_shapes(rule, layout.shape_of_use(kind))
        sizes = [s.numel() for s in shapes]
        lead = () if layout.members is None else (layout.members,)
        used = vector[: (layout.members or 1) * (sum(sizes) + 1)].reshape([*lead, -1])
        *parts, rows = used.split([*sizes, 1], -1)
        split[kind] = [*(p.reshape([*lead, *shape]) for p, shape in zip(parts, shapes)), rows.squeeze(-1)]
    return split


def uses_of(rule: Rule, layout: Layout, summaries: dict[int, list[Tensor]], scales: Scales | None = None) -> list[Use]:
    uses = []
    for kind, (*parts, rows) in summaries.items():
        summary = tuple(parts) if scales is None else rule.unscale(tuple(parts), scales.statistics)
        uses.append(Use(summary, rows, opposite=kind != layout.kinds[0]))
    return uses
