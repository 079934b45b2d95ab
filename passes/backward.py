"""The drop-in door's other mode: preconditioning written into the backward graph, and the refresh that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..graphs import Graphs
from ..ir import INPUTS_FIRST, INPUTS_LAST, StepGraph
from ..rules import Gradient, Rule
from .backend import new_fake_mode, plain_tracing
from .capture import described_gradients
from .collectives import Group, Network
from .drop_in import Job, StatisticsPass, compile_flat, padded_rows, placeholder, scales_over_ranks
from .rewrite import Layout, Scales, refreshed, split_statistics, uses_of, write_statistics
from .trace import insert


class BackwardPass(StatisticsPass):
    """As :class:`StatisticsPass`, and hands out directions in place of gradients.

    ``states`` are the names of each site's state tensors, passed right behind its carrier, ``scale`` last.
    """

    def __init__(self, *args: Any, states: dict[int, list[str]]) -> None:
        super().__init__(*args)
        self.states = states

    def uuid(self) -> str:
        return f"{super().uuid()}-{sorted(self.states.items())}"

    def _rewrite(self, step: StepGraph) -> None:
        positions = described_gradients(step.graph)
        outputs = list(step.output.args[0])
        for index, site in step.sites.items():
            at = self.carriers[index]
            carrier = step.inputs[at].meta["val"]
            state = {name: step.inputs[at + 1 + i] for i, name in enumerate(self.states[index])}
            scale = state.pop("scale")
            label = f"{site.parameter.name}: precondition"
            with step.graph.inserting_before(step.output):
                vectors = write_statistics(step.graph, self.rule, site, carrier.dtype)
                direction, bias, outputs[positions[at]] = insert(
                    step.graph,
                    precondition_in_backward,
                    self.rule,
                    Layout.of(site),
                    site.parameter.grad,
                    site.bias.grad if site.bias is not None else None,
                    vectors,
                    state,
                    scale,
                    carrier.shape[1],
                    label=label,
                )
            outputs[positions[index]] = direction
            if site.bias is not None:
                outputs[positions[site.bias.index]] = bias
        step.output.args = (tuple(outputs),)


def build_refresh(
    rule: Rule,
    jobs: Sequence[Job],
    carriers: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    step: Tensor,
    backend: str,
    options: dict[str, Any],
    graphs: Graphs,
    group: Group | None = None,
) -> Callable[..., list[Tensor]]:
    """A program ``[step, *(carrier, *state) of each job] -> new state of each job``, flat; nothing is written in place.

    With a ``group`` carriers are summed over its ranks, on each of which they belong to that rank's own loss.
    """
    mode, graph = new_fake_mode(), fx.Graph()
    with plain_tracing():
        step_node = placeholder(graph, mode, "step", step)
        nodes = [
            (
                placeholder(graph, mode, f"carrier_{i}", carrier),
                {key: placeholder(graph, mode, f"state_{i}_{key}", t) for key, t in state.items()},
            )
            for i, (carrier, state) in enumerate(zip(carriers, states))
        ]
        outputs: list[fx.Node] = []
        network = None if group is None else Network(graph, group)
        scales = None
        if group is not None:
            scales = insert(graph, scales_over_ranks, None, step_node, group.size, label="mean over ranks")
        for job, (carrier_node, state_nodes) in zip(jobs, nodes):
            if network is not None:
                carrier_node = network.sum(carrier_node, "statistics", job.name)
            new = insert(
                graph,
                refresh_after_backward,
                rule,
                job.layout,
                job.refresh,
                carrier_node,
                state_nodes,
                step_node,
                scales,
                label=f"{job.name}: refresh",
            )
            outputs += [new[key] for key in state_nodes]
        return compile_flat(graph, outputs, backend, options, graphs, group)


# ---- what is traced into the graphs ------------------------------------------------------------------------------------


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

    The carrier's third row holds ``|G|^2, |D|^2`` of weight and bias of each matrix: additive, so micro-batches and ranks
    can be summed. Linear in the gradient, given factors and ``scale``.
    """
    dtype, raw = scale.dtype, without_rescale(rule)

    def member(
        state: dict[str, Tensor], gradients: dict[str, Tensor], scale: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        directions = raw.precondition(state, Gradient(**gradients)).tensors()
        norms = [_square_sum(t.get(name), dtype) for name in ("weight", "bias") for t in (gradients, directions)]
        norms = [scale.new_zeros(()) if norm is None else norm for norm in norms]
        if raw is not rule:
            directions = {k: d * s.to(d.dtype) for (k, d), s in zip(directions.items(), scale)}
        return directions, torch.stack(norms)

    directions, norms = layout.each(member)(state, layout.orient(grad, bias_grad).tensors(), scale)
    rows = [vectors.get(kind) for kind in (INPUTS_LAST, INPUTS_FIRST)] + [norms.flatten()]
    bias = None if bias_grad is None else directions["bias"].reshape(bias_grad.shape)
    return layout.store(directions["weight"], grad.shape), bias, padded_rows(rows, size, scale)


def _square_sum(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else (x.to(dtype) * x.to(dtype)).sum()


def refresh_after_backward(
    rule: Rule,
    layout: Layout,
    refresh: bool,
    carrier: Tensor,
    state: dict[str, Tensor],
    step: Tensor,
    scales: Scales | None = None,
) -> dict[str, Tensor]:
    """New state from a step's carrier: factors where ``refresh``, the scale always; unchanged where not finite."""
    factors = {name: t for name, t in state.items() if name != "scale"}
    finite = torch.isfinite(carrier).all()
    if refresh:
        nothing = Gradient(
            carrier.new_zeros(layout.shape.O, layout.shape.I),
            carrier.new_zeros(layout.shape.O) if layout.bias else None,
        )

        def member(factors: dict[str, Tensor], summaries: dict[int, list[Tensor]]) -> dict[str, Tensor]:
            return refreshed(rule, factors, uses_of(rule, layout, summaries, scales), nothing, step, finite)

        summaries = split_statistics(rule, layout, {kind: carrier[kind] for kind in layout.kinds})
        factors = layout.each(member)(factors, summaries)
    scale = state["scale"]
    norms = carrier[2, : 2 * scale.numel()].reshape([*scale.shape[:-1], 4])
    quotient = (norms[..., 0::2] / norms[..., 1::2]).sqrt().to(scale.dtype)
    usable = torch.isfinite(quotient) & (quotient > 0) & finite
    return {**factors, "scale": torch.where(usable, quotient, scale)}


def without_rescale(rule: Rule) -> Rule:
    return replace(rule, rescale=False) if getattr(rule, "rescale", False) else rule  # type: ignore[type-var]
