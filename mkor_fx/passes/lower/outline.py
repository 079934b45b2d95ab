"""Equal updates are one function of the compiled program."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..sources import library_sources
from ..torch_api.backend import PostGradPass
from ..torch_api.outlined import call_outlined

COPY = torch.ops.aten.copy_.default


class Outline(PostGradPass):
    """Moves what is computed for one parameter's update alone into a function; of parameters whose updates are computed
    alike, into the same one. ``owners`` says to whose update each input of the program belongs (None: to nobody's)."""

    def __init__(self, owners: Sequence[Hashable]) -> None:
        self.owners = tuple(owners)

    def __call__(self, graph: fx.Graph) -> None:
        outline(graph, self.owners)

    def uuid(self) -> Any:
        return library_sources(), repr(self.owners)


def outline(graph: fx.Graph, owners: Sequence[Hashable]) -> None:
    owner_of = dict(zip(graph.find_nodes(op="placeholder"), owners, strict=True))
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    owned: dict[fx.Node, Hashable] = {}
    for node in reversed(graph.nodes):
        if (owner := _owner(node, owner_of, owned)) is not None:
            owned[node] = owner
            groups[owner].append(node)
    alike: dict[Hashable, str] = {}
    for nodes in groups.values():
        nodes.reverse()
        if len(nodes) > 3:
            _call(graph, nodes, alike)
    graph.lint()


def _owner(node: fx.Node, owner_of: dict[fx.Node, Hashable], owned: dict[fx.Node, Hashable]) -> Hashable:
    if node.op != "call_function" or not (isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem):
        return None
    if node.target is COPY:
        return owner_of.get(node.args[0]) if not node.users else None
    owners = {owned.get(user) for user in node.users}
    return owners.pop() if len(owners) == 1 else None


def _call(graph: fx.Graph, nodes: list[fx.Node], alike: dict[Hashable, str]) -> None:
    inside = set(nodes)
    operands = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside))
    if any(not isinstance(operand.meta.get("val"), torch.Tensor) for operand in operands):
        return
    place = {node: ("operand", i) for i, node in enumerate(operands)} | {node: ("node", i) for i, node in enumerate(nodes)}
    spelled = tuple((node.target, repr(pytree.tree_map_only(fx.Node, place.get, (node.args, node.kwargs)))) for node in nodes)
    shapes = tuple(_like(operand) for operand in operands)
    written = tuple(operands.index(node.args[0]) for node in nodes if node.target is COPY)
    module = graph.owning_module
    name = alike.get((spelled, shapes))
    if name is None:
        name = alike[spelled, shapes] = f"update_{len(alike)}"
        setattr(module, name, fx.GraphModule(module, _function(nodes, operands)))
    last = max(_position(graph, node) for node in operands) # noqa
    with graph.inserting_before(graph.output_node()):
        function = graph.get_attr(name)
        graph.call_function(call_outlined, (function, written, *operands))
    for node in reversed(nodes):
        graph.erase_node(node)


def _position(graph, node):
    return 0


def _like(operand: fx.Node) -> tuple:
    value = operand.meta["val"]
    return value.shape, value.stride(), value.dtype, value.device, operand.op == "placeholder"


def _function(nodes: list[fx.Node], operands: list[fx.Node]) -> fx.Graph:
    function, copies = fx.Graph(), {}
    for i, operand in enumerate(operands):
        copies[operand] = function.placeholder(f"operand_{i}")
        copies[operand].meta = {"val": operand.meta["val"]}
    for node in nodes:
        copies[node] = function.node_copy(node, copies.__getitem__)
    function.output(())
    return function
