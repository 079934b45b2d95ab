"""From Dynamo's graph to a joint forward and backward graph. One of the homes of torch's private APIs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    SubclassGetAttrAOTInput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

from ...ir import Parameter, StepGraph
from ...ops import TABLE
from ...reasons import SHARDED
from ..naming import Naming
from .dynamo import check_loss, data_inputs, dense_lookups, dynamo_parameters


class DecompositionTable(dict):
    """Pickles as the name of what makes it: Inductor's cache hashes its options, and function tables cannot be hashed."""

    def __reduce__(self) -> tuple:
        return decompositions, ()


def decompositions() -> DecompositionTable:
    """Inductor's table without the ops that the op table matches: it would lose embeddings and small products."""
    import torch._inductor.lowering  # noqa: F401  (the table's body of max_pool2d reads it, and does not import it)
    from torch._inductor.decomposition import select_decomp_table

    return DecompositionTable({op: body for op, body in select_decomp_table().items() if str(op) not in TABLE})


@contextlib.contextmanager
def unrolled_layers(gm: fx.GraphModule) -> Iterator[None]:
    """While ``gm`` is traced: an LSTM becomes its time steps.

    torch would take oneDNN's inference kernel, which has no backward, where the input of an LSTM needs no gradient.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled and all(getattr(n.target, "__name__", "") != "lstm" for n in gm.graph.nodes))
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave ``text()`` in torch's trace log (``TORCH_TRACE``, read by tlparse), under what is being compiled now."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )


@dataclass
class WholeStep(StepGraph):
    """A joint graph whose only seed belongs to the loss, with what is to be written back.

    ``results`` are the positions of the function's own outputs among the joint graph's, the loss first; ``mutations``
    the buffers that the forward changes: ``(input, position of the new value)``.
    """

    results: list[int] = field(default_factory=list)
    mutations: list[tuple[fx.Node, int]] = field(default_factory=list)


def read_joint(module: fx.GraphModule, named: dict[int, str], data: frozenset[int], naming: Naming) -> StepGraph:
    """Wrap a joint graph; ``named`` are the parameters' names by input position, ``data`` the data's positions."""
    graph = module.graph
    described = described_inputs(graph)
    by_index = {d.idx: node for node, d in described if isinstance(d, PlainAOTInput)}
    grads = {
        description.grad_of.idx: position
        for position, (value, description) in enumerate(described_outputs(graph))
        if value is not None
        and isinstance(description, GradAOTOutput)
        and isinstance(description.grad_of, PlainAOTInput)
    }
    parameters = {
        index: Parameter(
            index,
            name,
            tuple(by_index[index].meta["val"].shape),
            by_index[index],
            grads.get(index),
            naming.excluded(name) or (None if isinstance(by_index[index].meta["desc"], PlainAOTInput) else SHARDED),
        )
        for index, name in named.items()
    }
    seeds = [node for node, d in described if isinstance(d, TangentAOTInput)]
    inputs = [by_index[index] for index in sorted(by_index)]
    return StepGraph(module, inputs, parameters, seeds, {by_index[index] for index in data})


def described_inputs(graph: fx.Graph) -> list[tuple[fx.Node, Any]]:
    """Each input and what it is. A DTensor is its local tensor; its mesh, an input as well, is left out."""
    found = []
    for node in graph.find_nodes(op="placeholder"):
        whole = description = node.meta.get("desc")
        while isinstance(whole, SubclassGetAttrAOTInput):
            whole = whole.base
        if whole is description or isinstance(node.meta["val"], Tensor):
            found.append((node, whole))
    return found


def described_outputs(graph: fx.Graph) -> list[tuple[fx.Node | None, Any]]:
    output = graph.output_node()
    return list(zip(output.args[0], output.meta["desc"]))


def described_gradients(graph: fx.Graph) -> dict[int, int]:
    """Input position -> where the joint graph returns its gradient."""
    return {
        d.grad_of.idx: position  # type: ignore[attr-defined]
        for position, (_, d) in enumerate(described_outputs(graph))
        if isinstance(d, GradAOTOutput)
    }


def has_backward(graph: fx.Graph) -> bool:
    """Whether a captured graph differentiates anything."""
    return any(isinstance(description, TangentAOTInput) for _, description in described_inputs(graph))


def capture_joint(gm: fx.GraphModule, inputs: Sequence[Any], naming: Naming) -> StepGraph | None:
    """The joint graph of Dynamo's graph, to look at; None where nothing in it is differentiated."""
    named = {index: name for index, (name, _) in dynamo_parameters(gm, naming).items()}
    with unrolled_layers(gm), contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, gm, tuple(inputs), decompositions=decompositions())
        step = read_joint(joint.graph_module, named, data_inputs(gm, naming), naming)
    return step if step.seeds else None


def capture_whole_step(gm: fx.GraphModule, example_inputs: Sequence[Any], naming: Naming) -> WholeStep:
    """The joint graph of a function that returns ``(loss, *detached outputs)``.

    Raises:
        ValueError: the loss is not a scalar, or depends on no trainable parameter.
    """
    named = {index: name for index, (name, _) in dynamo_parameters(gm, naming).items()}
    check_loss(gm, named)
    gm = dense_lookups(gm)
    with unrolled_layers(gm), contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, gm, tuple(example_inputs), decompositions=decompositions())
        captured = read_joint(joint.graph_module, named, data_inputs(gm, naming), naming)
    if len(captured.inputs) + len(captured.seeds) != len(captured.graph.find_nodes(op="placeholder")):
        raise ValueError(
            "the step holds an operation with side effects that are kept in order (torch.linalg.solve checks its result "
            "so), which one program cannot return: use mkor_fx.compile(model) with your own loop"
        )
    if len(captured.seeds) != 1:
        raise ValueError(f"{len(captured.seeds)} outputs of the step carry gradients; only the loss may")
    described = [d for _, d in described_outputs(captured.graph)]
    results = {d.idx: position for position, d in enumerate(described) if isinstance(d, PlainAOTOutput)}
    mutations = [
        (captured.inputs[d.mutated_input.idx], position)
        for position, d in enumerate(described)
        if isinstance(d, InputMutationAOTOutput)
    ]
    captured.graph.set_codegen(fx.graph.CodeGen())
    return WholeStep(**vars(captured), results=[results[i] for i in sorted(results)], mutations=mutations)
