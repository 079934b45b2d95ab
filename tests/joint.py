"""Captured graphs for tests: the joint graphs of a model on a batch, with the values to run them on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._subclasses.fake_tensor import FakeTensorMode

from mkor_fx.ir import Operand, Site, StepGraph
from mkor_fx.passes.naming import Naming
from mkor_fx.passes.pipeline import analyse
from mkor_fx.passes.torch_api.backend import plain_tracing
from mkor_fx.passes.torch_api.capture import capture_joint
from mkor_fx.passes.torch_api.dynamo import own_code
from mkor_fx.passes.torch_api.tracing import add_input, insert
from mkor_fx.rules import MKOR, Rules
from mkor_fx.show.graphs import Graphs


@dataclass
class Joint:
    """One joint graph and its flat inputs, the gradients of the outputs all ones."""

    step: StepGraph
    values: list[Any]

    def run(self, seed: int = 0) -> dict[fx.Node, Any]:
        """The value of every node, interpreted."""
        interpreter = fx.Interpreter(self.step.module, garbage_collect_values=False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values = (v.detach().clone() if isinstance(v, Tensor) else v for v in self.values)
            interpreter.run(*values, enable_io_processing=False)
        return interpreter.env

    def outputs(self, seed: int = 0) -> list[Any]:
        env = self.run(seed)
        return [env[node] if isinstance(node, fx.Node) else node for node in self.step.output.args[0]]

    def site(self, name: str) -> Site:
        return next(site for site in self.step.sites.values() if site.parameter.name == name)


def rows(env: dict[fx.Node, Any], operand: Operand) -> Tensor:
    """What an operand stands for, given the value of every node."""
    arguments = pytree.tree_map_only(fx.Node, env.__getitem__, operand.arguments)
    return operand.view(env[operand.node], *arguments)


def capture(model: nn.Module, *args: Any, match: bool = True) -> list[Joint]:
    """The joint graphs of ``model(*args)``, one for each graph that Dynamo makes; analysed if ``match``."""
    naming, found = Naming.of(model), []

    def backend(gm, inputs):
        step = capture_joint(gm, inputs, naming)
        if step is None:  # nothing in this graph is differentiated
            return gm
        if match:
            with plain_tracing():
                analyse(step, Rules.of(MKOR.published()), Graphs("test"))

        def run(*values):
            flat = [_value(node, values) for node in step.graph.find_nodes(op="placeholder")]
            found.append(Joint(step, flat))
            with torch.no_grad():
                results = gm(*values)
            return [r.requires_grad_().clone() if r.is_floating_point() else r for r in results]  # no leaves

        return run

    def call(*batch):
        return type(model)._call_impl(model, *batch)

    buffers = copy.deepcopy(dict(model.named_buffers()))
    torch.compile(own_code(call), backend=backend, dynamic=False)(*args)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return found


def _value(node: fx.Node, values: tuple) -> Any:
    description, fake = node.meta["desc"], node.meta["val"]
    if isinstance(description, PlainAOTInput):
        return values[description.idx]
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).fill_(1)


def program(function, *tensors: Tensor) -> StepGraph:
    """A graph of one call of ``function``, prims left as they are, with no parameters: ``step.module(*tensors)``."""
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = [add_input(graph, f"x{i}", t, mode) for i, t in enumerate(tensors)]
    graph.output(insert(graph, function, *nodes))
    return StepGraph(fx.GraphModule({}, graph), nodes, {}, [])
