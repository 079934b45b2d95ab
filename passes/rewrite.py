"""Write statistics and the rule's update into a graph. Both doors write the same code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ir import INPUTS_FIRST, INPUTS_LAST, Decline, Operand, Site, StepGraph, Tap
from ..rules import Gradient, Rule, Shape, Use
from .core import graph_pass
from .trace import insert


@dataclass(frozen=True)
class Layout:
    """How one parameter is stored and used: what the update has to know beside the tensors.

    ``matrix`` is the parameter's matrix view; ``kinds`` the orientations in which it is used; ``bias`` its bias's length
    matched or not.
    """

    matrix: tuple[int, int]
    kinds: tuple[int, ...]
    bias: bool

    @classmethod
    def of(cls, site: Site) -> Layout:
        return cls(site.matrix, site.kinds, site.bias is not None)

    @property
    def stored_inputs_first(self) -> bool:
        """``[I, O]`` in memory; a weight used both ways counts as ``[O, I]``."""
        return self.kinds == (INPUTS_FIRST,)

    @property
    def shape(self) -> Shape:
        outputs, inputs = self.matrix[::-1] if self.stored_inputs_first else self.matrix
        return Shape(outputs, inputs, self.bias)

    def orient(self, grad: Tensor, bias: Tensor | None) -> Gradient:
        """A gradient as stored -> ``[O, I]`` as rules see it."""
        matrix = grad.reshape(self.matrix)
        return Gradient(matrix.t() if self.stored_inputs_first else matrix, bias)

    def store(self, direction_OI: Tensor, shape: torch.Size) -> Tensor:
        """``[O, I]`` -> the parameter's own shape."""
        return (direction_OI.t() if self.stored_inputs_first else direction_OI).reshape(shape)

    def fresh_state(self, rule: Rule) -> Callable[[torch.device], dict[str, Tensor]]:
        return partial(rule.init, self.shape)

    def fresh_state_with_scale(self, rule: Rule, dtype: torch.dtype) -> Callable[[torch.device], dict[str, Tensor]]:
        """With the ``scale`` that brings weight and bias direction to the last step's gradient norms, ``[2]``."""
        return lambda device: {**rule.init(self.shape, device), "scale": torch.ones(2, dtype=dtype, device=device)}


@graph_pass(stage="match", exact=True)
def decline_by_rule(step: StepGraph, *, rule: Rule) -> None:
    """A weight for which the rule keeps no state is declined with its bias; so is a bias that the rule leaves alone."""
    for index, site in list(step.sites.items()):
        shape = Layout.of(site).shape
        weight, bias = site.parameter.name, site.bias
        if not rule.init(shape, torch.device("meta")):
            del step.sites[index]
            reason = f"{type(rule).__name__} keeps no factor for {shape.O} x {shape.I}: both sides exceed max_factor"
            step.declines[index] = Decline(reason, str(site.taps[0].node.target))
            if bias is not None:
                step.declines[bias.index] = Decline(f"its weight {weight} is declined")
        elif bias is not None and not rule.preconditions_bias(shape):
            site.bias = None
            step.declines[bias.index] = Decline(f"{type(rule).__name__} leaves the bias of {weight} alone")


def merge_layouts(first: Layout, second: Layout) -> Layout:
    """A weight used in two graphs: the orientations of both. The bias stays only where both have it."""
    if first.matrix != second.matrix:
        raise ValueError(f"one weight is read as a matrix of {first.matrix} and of {second.matrix} in two graphs")
    return Layout(first.matrix, tuple(sorted({*first.kinds, *second.kinds})), first.bias and second.bias)


class Scales(NamedTuple):
    """What a loss scaler has left in the statistics and in the gradient, 0-dim each; not finite: touch nothing."""

    statistics: Tensor
    gradient: Tensor


def summary_shapes(rule: Rule, inputs: int, outputs: int) -> list[torch.Size]:
    """Shapes of what ``rule.summarize`` returns for a weight of ``[outputs, inputs]``."""
    with torch.device("meta"):
        return [s.shape for s in rule.summarize(torch.empty(1, inputs), torch.empty(1, outputs))]


def statistics_size(rule: Rule, matrix: tuple[int, int]) -> int:
    """Numbers in one statistics vector: the summary, flat, and the number of rows behind it."""
    sizes = [sum(s.numel() for s in summary_shapes(rule, *sides)) for sides in (matrix, matrix[::-1])]
    return max(sizes) + 1


def summarize_use(
    rule: Rule, a_view: Callable, a: tuple, g_view: Callable, g: tuple, count: Any, dtype: torch.dtype
) -> Tensor:
    """One use's statistics vector, ``[S]``: the flat summary, the number of rows last."""
    a_NI, g_NO = a_view(*a), g_view(*g)
    rows = torch.ones_like(g_NO[:, 0], dtype=dtype).sum() if count is None else count[0](*count[1:]).to(dtype)
    return torch.cat([s.reshape(-1).to(dtype) for s in rule.summarize(a_NI, g_NO)] + [rows.reshape(1)])


def write_statistics(graph: fx.Graph, rule: Rule, site: Site, dtype: torch.dtype) -> dict[int, fx.Node]:
    """Insert the statistics vector of each orientation in which the site's weight is used."""
    label = f"{site.parameter.name}: statistics"
    vectors: dict[int, fx.Node] = {}
    for tap in site.taps:
        assert tap.inputs is not None
        vector = _write_use(graph, rule, tap, dtype, label)
        known = vectors.get(tap.inputs)
        vectors[tap.inputs] = vector if known is None else insert(graph, torch.add, known, vector, label=label)
    return vectors


def _write_use(graph: fx.Graph, rule: Rule, tap: Tap, dtype: torch.dtype, label: str) -> fx.Node:
    def spread(operand: Operand) -> tuple:
        return (operand.node, *operand.arguments)

    count = None if tap.count is None else (tap.count.view, *spread(tap.count))
    a, g = tap.a, tap.g
    return insert(graph, summarize_use, rule, a.view, spread(a), g.view, spread(g), count, dtype, label=label)


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

    ``vectors`` are the statistics by orientation, each a flat summary with the number of rows behind it. State is
    refreshed before it preconditions, and stays as it was where a statistic is not finite.
    """
    oriented = layout.orient(grad, bias_grad)
    if refresh:
        finite = _finite(rule, oriented, vectors)
        uses, read = _uses(rule, layout, vectors), oriented
        if scales is not None:
            finite = finite & torch.isfinite(scales.statistics) & torch.isfinite(scales.gradient)
            uses = [use._replace(summary=rule.unscale(use.summary, scales.statistics)) for use in uses]
            read = Gradient(*(None if g is None else g / scales.gradient.to(g.dtype) for g in oriented))
        updated = rule.update(state, uses, read, step)
        state = {name: torch.where(finite, updated[name], old) for name, old in state.items()}
    direction, bias_direction = rule.precondition(state, oriented)
    return layout.store(direction, grad.shape), bias_direction, state


def _finite(rule: Rule, grad: Gradient, vectors: dict[int, Tensor]) -> Tensor:
    checks = [torch.isfinite(vector).all() for vector in vectors.values()]
    if rule.reads_gradient:
        checks += [torch.isfinite(g).all() for g in grad if g is not None]
    finite = checks[0]
    for check in checks[1:]:
        finite = finite & check
    return finite


def _uses(rule: Rule, layout: Layout, vectors: dict[int, Tensor]) -> list[Use]:
    uses = []
    for kind, vector in vectors.items():
        outputs, inputs = layout.matrix if kind == INPUTS_LAST else layout.matrix[::-1]
        shapes = summary_shapes(rule, inputs, outputs)
        sizes = [s.numel() for s in shapes]
        *parts, rows, _ = vector.split([*sizes, 1, vector.numel() - sum(sizes) - 1])
        summary = tuple(part.reshape(shape) for part, shape in zip(parts, shapes))
        uses.append(Use(summary, rows[0], opposite=kind != layout.kinds[0]))
    return uses


# ---- preconditioning inside the backward ----------------------------------------------------------------------------


def precondition_in_backward(
    rule: Rule,
    layout: Layout,
    grad: Tensor,
    bias_grad: Tensor | None,
    vectors: dict[int, Tensor],
    state: dict[str, Tensor],
    scale: Tensor,
    size: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(direction, bias direction, carrier gradient)`` with the factors and norms from before this step.

    The carrier's third row holds ``|G|^2, |D|^2`` of the weight and of the bias: additive, so micro-batches and ranks can
    be summed. Linear in the gradient, given factors and ``scale``.
    """
    oriented = layout.orient(grad, bias_grad)
    direction, bias_direction = without_rescale(rule).precondition(state, oriented)
    dtype = scale.dtype
    pairs = ((oriented.weight, direction), (bias_grad, bias_direction))
    zero = scale.new_zeros(())
    norms = [zero if t is None else (t.to(dtype) * t.to(dtype)).sum() for pair in pairs for t in pair]
    if getattr(rule, "rescale", False):
        direction = direction * scale[0].to(grad.dtype)
        bias_direction = None if bias_direction is None else bias_direction * scale[1].to(grad.dtype)
    rows = [vectors.get(kind) for kind in (INPUTS_LAST, INPUTS_FIRST)] + [torch.stack(norms)]
    padded = [
        scale.new_zeros(size) if r is None else torch.nn.functional.pad(r.to(dtype), (0, size - r.numel()))
        for r in rows
    ]
    return layout.store(direction, grad.shape), bias_direction, torch.stack(padded)


def refresh_after_backward(
    rule: Rule, layout: Layout, refresh: bool, carrier: Tensor, state: dict[str, Tensor], step: Tensor
) -> dict[str, Tensor]:
    """New state from a step's carrier: factors where ``refresh``, the scale always; unchanged where not finite."""
    state = dict(state)
    scale = state.pop("scale")
    finite = torch.isfinite(carrier).all()
    new = state
    if refresh:
        nothing = Gradient(
            carrier.new_zeros(layout.shape.O, layout.shape.I),
            carrier.new_zeros(layout.shape.O) if layout.bias else None,
        )
        uses = _uses(rule, layout, {kind: carrier[kind] for kind in layout.kinds})
        updated = rule.update(state, uses, nothing, step)
        new = {name: torch.where(finite, updated[name], old) for name, old in state.items()}
    before, after = carrier[2, 0:4:2], carrier[2, 1:4:2]
    quotient = (before / after).sqrt().to(scale.dtype)
    usable = torch.isfinite(quotient) & (quotient > 0) & finite
    return {**new, "scale": torch.where(usable, quotient, scale)}


def without_rescale(rule: Rule) -> Rule:
    return replace(rule, rescale=False) if getattr(rule, "rescale", False) else rule  # type: ignore[type-var]
