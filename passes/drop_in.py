"""The two programs of the drop-in door: statistics inside the backward graph, and the update at the optimizer's step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..graphs import Graphs
from ..ir import INPUTS_FIRST, INPUTS_LAST, StepGraph
from ..rules import Rule
from .backend import FakeTensorMode, JointPass, compile_graph, new_fake_mode, plain_tracing
from .capture import Naming, capture_joint, described_gradients, has_backward, read_joint
from .collectives import Group, Network
from .pin import Overlap
from .pipeline import analyse, synthesise
from .rewrite import Layout, Scales, update_site, write_statistics
from .trace import insert, shaped_like


@dataclass
class Capture:
    """What the pass learns about one graph: roles by input position, kept for every call of the compiled code."""

    step: StepGraph | None = None
    layouts: dict[int, Layout] = field(default_factory=dict)
    biases: dict[int, int] = field(default_factory=dict)


def find_layouts(gm: fx.GraphModule, inputs: Sequence[Any], naming: Naming, rule: Rule) -> dict[int, Layout]:
    """The sites of a graph before it is compiled: what inputs it will need beside Dynamo's."""
    step = capture_joint(gm, inputs, naming)
    if step is None:
        return {}
    with plain_tracing():
        analyse(step, rule, None)
    return {index: Layout.of(site) for index, site in step.sites.items()}


class StatisticsPass(JointPass):
    """Runs on the joint graph before Inductor's own passes: writes each site's statistics into its carrier's gradient.

    ``carriers`` maps a parameter's input position to its carrier's.
    """

    def __init__(
        self,
        rule: Rule,
        naming: Naming,
        named: dict[int, str],
        data: frozenset[int],
        carriers: dict[int, int],
        graphs: Graphs,
        inductor: bool,
    ) -> None:
        self.rule, self.naming, self.named, self.data, self.carriers = rule, naming, named, data, carriers
        self.graphs, self.inductor, self.capture = graphs, inductor, Capture()

    def uuid(self) -> str:
        content = repr((self.rule, self.naming.skip, self.named, sorted(self.data), self.carriers, self.inductor))
        return hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        if not has_backward(graph):
            return
        assert graph.owning_module is not None
        step = read_joint(graph.owning_module, self.named, self.data, self.naming)
        with plain_tracing():
            analyse(step, self.rule, self.graphs)
            synthesise(step, self._rewrite, self.graphs, inductor=self.inductor, partitioned=True)
        layouts = {index: Layout.of(site) for index, site in step.sites.items()}
        biases = {index: site.bias.index for index, site in step.sites.items() if site.bias is not None}
        self.capture = Capture(step, layouts, biases)

    def _rewrite(self, step: StepGraph) -> None:
        positions = described_gradients(step.graph)
        outputs = list(step.output.args[0])
        for index, site in step.sites.items():
            carrier = step.inputs[self.carriers[index]].meta["val"]
            with step.graph.inserting_before(step.output):
                vectors = write_statistics(step.graph, self.rule, site, carrier.dtype)
                outputs[positions[self.carriers[index]]] = insert(
                    step.graph, carry, vectors, carrier.shape[1], label=f"{site.parameter.name}: statistics"
                )
        step.output.args = (tuple(outputs),)


def carry(vectors: dict[int, Tensor], size: int) -> Tensor:
    """Statistics vectors by orientation as the rows of a carrier, ``[2, size]``; an unused row is zero."""
    like = next(iter(vectors.values()))
    return padded_rows([vectors.get(kind) for kind in (INPUTS_LAST, INPUTS_FIRST)], size, like)


def padded_rows(rows: list[Tensor | None], size: int, like: Tensor) -> Tensor:
    """Vectors as rows of a carrier, ``[len(rows), size]``, in the dtype of ``like``; a missing one is zero."""
    rows = [like.new_zeros(size) if r is None else r.to(like.dtype) for r in rows]
    return torch.stack([torch.nn.functional.pad(r, (0, size - r.numel())) for r in rows])


# ---- the update at the optimizer's step ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One parameter in an update program: its stored shape and layout, and whether its factors are refreshed."""

    name: str
    layout: Layout
    refresh: bool


def build_update(
    rule: Rule,
    jobs: Sequence[Job],
    examples: Sequence[dict[str, Any]],
    step: Tensor,
    scales: tuple[Tensor, ...],
    backend: str,
    options: dict[str, Any],
    graphs: Graphs,
    group: Group | None = None,
) -> Callable[..., list[Tensor]]:
    """One program that refreshes and preconditions all of ``jobs``.

    With a ``group`` statistics are summed over its ranks, on each of which they belong to that rank's own loss, while
    gradients are the mean's already.

    ``examples`` hold each job's ``grad``, ``bias`` (or None), ``carrier`` (refreshed jobs) and ``state`` tensors. The
    program takes ``[step, *scales, *the tensors of each job in that order]``, copies new state into the state inputs and
    returns each job's direction and, where it has a bias, its direction.
    """
    graph = fx.Graph()
    input = partial(placeholder, graph, new_fake_mode())
    with plain_tracing():
        step_node = input("step", step)
        scale_nodes = (
            Scales(input("statistics_scale", scales[0]), input("gradient_scale", scales[1])) if scales else None
        )
        nodes = []
        for i, example in enumerate(examples):
            tensors = {k: t for k, t in example.items() if k != "state"}
            own = {k: None if t is None else input(f"{k}_{i}", t) for k, t in tensors.items()}
            state = {k: input(f"state_{i}_{k}", t) for k, t in example["state"].items()}
            nodes.append((own, state))
        network = None if group is None else Network(graph, group)
        if group is not None:
            scale_nodes = insert(graph, scales_over_ranks, scale_nodes, step_node, group.size, label="mean over ranks")
        outputs: list[fx.Node] = []
        writes: list[tuple[fx.Node, fx.Node]] = []
        for job, (own, state) in zip(jobs, nodes):
            vectors = {}
            if job.refresh:
                vectors = {
                    k: insert(graph, torch.select, own["carrier"], 0, k, label=job.name) for k in job.layout.kinds
                }
            if network is not None:
                vectors = {k: network.sum(vector, "statistics", job.name) for k, vector in vectors.items()}
            grad, bias, new = insert(
                graph,
                partial_update(rule, job),
                own["grad"],
                own["bias"],
                vectors,
                state,
                step_node,
                scale_nodes,
                label=f"{job.name}: update",
            )
            outputs += [grad] if bias is None else [grad, bias]
            writes += [(state[key], new[key]) for key in state] if job.refresh else []
        for target, value in writes:
            copy = graph.call_function(torch.ops.aten.copy_.default, (target, value))
            copy.meta = {"val": target.meta["val"], "mkor_fx": "write"}
        return compile_flat(graph, outputs, backend, options, graphs, group)


def scales_over_ranks(scales: Scales | None, like: Tensor, size: int) -> Scales:
    """The scale of a rank's own statistics beside those of the mean loss over ``size`` ranks."""
    if scales is None:
        one = torch.ones_like(like, dtype=torch.float32)
        scales = Scales(one, one)
    return scales._replace(statistics=scales.statistics * size)


def placeholder(graph: fx.Graph, mode: FakeTensorMode, name: str, example: Tensor) -> fx.Node:
    """A new input shaped as ``example``."""
    node = graph.placeholder(name)
    with mode:
        node.meta["val"] = shaped_like(example)
    return node


def compile_flat(
    graph: fx.Graph,
    outputs: list[fx.Node],
    backend: str,
    options: dict[str, Any],
    graphs: Graphs,
    group: Group | None = None,
) -> Callable[..., list[Tensor]]:
    """Finish a graph that was written from nothing: the later half of the pipeline, then the compiler."""
    graph.output(outputs)
    program = StepGraph(fx.GraphModule({}, graph), graph.find_nodes(op="placeholder"), {}, [])
    synthesise(program, lambda _: None, graphs, inductor=False, group=group)
    return compile_graph(program.module, backend, options, graphs.code, None if group is None else Overlap())


def partial_update(rule: Rule, job: Job) -> Callable:
    """``update_site`` of this job, one object per distinct (rule, layout, variant) so that its trace is shared."""
    key = (rule, job.layout, job.refresh)
    return _updates.setdefault(key, partial(update_site, *key))


_updates: dict[tuple, Callable] = {}
