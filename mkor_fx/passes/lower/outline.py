"""Equal updates are one function of the compiled program."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..sources import library_sources
from ..torch_api.backend import PostGradPass, cpp_wrapper
from ..torch_api.outlined import call_outlined

COPY = torch.ops.aten.copy_.default
invoke_subgraph = torch.ops.higher_order.invoke_subgraph
#: nodes of which a function is worth its call
SMALLEST = 4


class EqualUpdates(PostGradPass):
    """Moves what is computed for one parameter's update alone into a function; of parameters whose updates are computed
    alike, into the same one. ``owners`` says to whose update each input of the program belongs (None: to nobody's)."""

    def __init__(self, owners: Sequence[Hashable]) -> None:
        self.owners = tuple(owners)

    def __call__(self, graph: fx.Graph) -> None:
        if not cpp_wrapper():
            outline(graph, self.owners)

    def uuid(self) -> Any:
        return library_sources(), repr(self.owners)


def outline(graph: fx.Graph, owners: Sequence[Hashable]) -> None:
    functions = Functions(graph)
    for nodes in _alone(graph):
        functions.call(nodes)
    for nodes in _owned(graph, dict(zip(graph.find_nodes(op="placeholder"), owners, strict=True))):
        functions.call(nodes)
    graph.lint()


def _alone(graph: fx.Graph) -> Iterable[list[fx.Node]]:
    """What each operator that stands alone was expanded to, unless Inductor has written users of it in its midst, as it does
    where it pads products on a GPU."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if "mkor_fx_alone" in node.meta:
            groups[node.meta["mkor_fx_alone"]].append(node)
    place = {node: i for i, node in enumerate(graph.nodes)}
    ends = lambda nodes: all(place[user] > place[nodes[-1]] for node in nodes for user in {*node.users}.difference(nodes))
    return [nodes for nodes in groups.values() if ends(nodes)]


def _owned(graph: fx.Graph, owner_of: dict[fx.Node, Hashable]) -> Iterable[list[fx.Node]]:
    """What leads to one owner's update and nowhere else, ending in the copies into its inputs.

    It moves behind all other copies. So what reads an input that others write stays where it is, in front of them.
    """
    writer = {copy.args[0]: owner_of.get(copy.args[0]) for copy in graph.find_nodes(op="call_function", target=COPY)}
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    owned: dict[fx.Node, Hashable] = {}
    for node in reversed(graph.nodes):
        owner = _owner(node, owner_of, owned)
        if owner is not None and all(writer.get(base, owner) == owner for base in map(_base, node.all_input_nodes)):
            owned[node] = owner
            groups[owner].append(node)
    return [_without_copies_of_others(nodes[::-1]) for nodes in groups.values()]


def _without_copies_of_others(nodes: list[fx.Node]) -> list[fx.Node]:
    """``nodes`` but for copies of what is made elsewhere into what none of them reads: these are best where it is made."""
    inside = set(nodes)
    values = (node.args[1:2] if node.target is COPY else node.all_input_nodes for node in nodes)
    read = {_base(value) for group in values for value in group}
    return [node for node in nodes if node.target is not COPY or node.args[1] in inside or node.args[0] in read]


def _owner(node: fx.Node, owner_of: dict[fx.Node, Hashable], owned: dict[fx.Node, Hashable]) -> Hashable:
    if node.op != "call_function" or not (isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem):
        return None
    if node.target is operator.getitem and node.args[0].target is invoke_subgraph:
        return None
    if node.target is COPY:
        return owner_of.get(node.args[0]) if not node.users else None
    owners = {owned.get(user) for user in node.users}
    return owners.pop() if len(owners) == 1 else None


def _base(node: fx.Node) -> fx.Node:
    """What a node is a view of; itself."""
    while node.target is operator.getitem or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view):
        node = node.args[0]
    return node


class Functions:
    """Functions of a graph's module, and calls of them in the place of nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.module = graph, graph.owning_module
        self.names: dict[Hashable, str] = {}

    def call(self, nodes: list[fx.Node]) -> None:
        """Move ``nodes`` into a function, or find that one does the same already. Their results are its results; if it has
        none, it writes to its operands."""
        inside = set(nodes)
        operands = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside))
        if len(nodes) < SMALLEST or any(not isinstance(operand.meta.get("val"), torch.Tensor) for operand in operands):
            return
        results = [node for node in nodes if any(user not in inside for user in node.users)]
        written = [operands.index(node.args[0]) for node in nodes if node.target is COPY]
        bases = [_base(operand) for operand in operands]
        if any(bases.count(bases[at]) > 1 for at in written):  # a function knows nothing of operands that share memory
            return
        key = _spelled(nodes, operands, results)
        if key not in self.names:
            self.names[key] = f"outlined_{len(self.names)}"
            self.module.add_module(self.names[key], fx.GraphModule(self.module, _function(nodes, operands, results)))
        name = self.names[key]
        if not results:
            with self.graph.inserting_before(self.graph.output_node()):
                self.graph.call_function(call_outlined, (self.graph.get_attr(name), written, *operands))
        else:
            with self.graph.inserting_before(nodes[-1].next):
                call = self.graph.call_function(invoke_subgraph, (self.graph.get_attr(name), name, *operands))
                call.meta["val"] = tuple(node.meta["val"] for node in results)
                for i, node in enumerate(results):
                    item = self.graph.call_function(operator.getitem, (call, i))
                    item.meta = dict(node.meta)
                    node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
        for node in reversed(nodes):
            self.graph.erase_node(node)


def _spelled(nodes: list[fx.Node], operands: list[fx.Node], results: list[fx.Node]) -> Hashable:
    place = {node: f"operand {i}" for i, node in enumerate(operands)} | {node: f"node {i}" for i, node in enumerate(nodes)}
    calls = tuple((node.target, repr(pytree.tree_map_only(fx.Node, place.get, (node.args, node.kwargs)))) for node in nodes)
    return calls, tuple(map(_like, operands)), tuple(place[node] for node in results)


def _like(operand: fx.Node) -> Hashable:
    value = operand.meta["val"]
    return value.shape, value.stride(), value.dtype, value.device


def _function(nodes: list[fx.Node], operands: list[fx.Node], results: list[fx.Node]) -> fx.Graph:
    function, copies = fx.Graph(), {}
    for i, operand in enumerate(operands):
        copies[operand] = function.placeholder(f"operand_{i}")
        copies[operand].meta = {"val": operand.meta["val"]}
    for node in _early(nodes):
        copies[node] = function.node_copy(node, copies.__getitem__)
        if node.target is COPY and _like(node.args[0]) == _like(node.args[1]):  # behind it there is one tensor, not two
            copies[node.args[1]] = copies[node]
    function.output(tuple(copies[node] for node in results))
    return function


def _early(nodes: list[fx.Node]) -> list[fx.Node]:
    """``nodes``, each copy into an operand as early as all have read what it overwrites, if what it writes is read from then
    on alone: that needs no memory of its own."""
    place: dict[fx.Node, float] = {node: i for i, node in enumerate(nodes)}
    for i, copy in enumerate(nodes):
        if copy.target is not COPY:
            continue
        target, value = copy.args[:2]
        before = [place[node] for node in nodes[:i] if target in map(_base, node.all_input_nodes)]
        ready = max([place.get(value, -1), *before])
        others = [place.get(user, -1) for user in value.users if user is not copy]
        if _like(target) == _like(value) and value in place and others and min(others) > ready:
            place[copy] = ready + 0.5
    return sorted(nodes, key=place.__getitem__)
