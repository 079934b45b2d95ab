"""The drop-in door's other mode: preconditioning written into the backward graph, and the refresh that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ..graphs import Graphs
from ..ir import StepGraph
from ..rules import Rule
from .capture import Naming, capture_joint, described_gradients
from .drop_in import Job, StatisticsPass, compile_flat, placeholder
from .lower import new_fake_mode, plain_tracing
from .pipeline import analyse
from .rewrite import Layout, precondition_in_backward, refresh_after_backward, write_statistics
from .trace import insert


def find_layouts(
    gm: fx.GraphModule, inputs: Sequence[Any], named: dict[int, str], naming: Naming, rule: Rule
) -> dict[int, Layout]:
    """The sites of a graph before it is compiled: what inputs the preconditioned one will need."""
    step = capture_joint(gm, inputs, named, naming)
    if step is None:
        return {}
    with plain_tracing():
        analyse(step, rule, Graphs("analysis"))
    return {index: Layout.of(site) for index, site in step.sites.items()}


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
) -> Callable[..., list[Tensor]]:
    """A program ``[step, *(carrier, *state) of each job] -> new state of each job``, flat; nothing is written in place."""
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
        for job, (carrier_node, state_nodes) in zip(jobs, nodes):
            new = insert(
                graph,
                refresh_after_backward,
                rule,
                job.layout,
                job.refresh,
                carrier_node,
                state_nodes,
                step_node,
                label=f"{job.name}: refresh",
            )
            outputs += [new[key] for key in state_nodes]
        return compile_flat(graph, outputs, backend, options, graphs)
