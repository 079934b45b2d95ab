"""Plain torch code into graph nodes: trace once per distinct shape, splice as often as needed. One of the homes of torch's
private APIs."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...ir import fake_value
from ...rules.results import WrongResult

Decompositions = Mapping[torch._ops.OpOverload, Callable]


class Traced(NamedTuple):
    """A graph over the tensor leaves of a function's arguments, and how its flat outputs were nested."""

    module: fx.GraphModule
    structure: pytree.TreeSpec


class Outline(NamedTuple):
    """What a trace remembers of a tensor: no memory, and nothing that would keep what it was traced for alive."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Outline:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


#: (function, structure and shapes of its arguments, decomposition table) -> its trace; the last that were used
_traced: OrderedDict[tuple, Traced] = OrderedDict()
#: how many traces are kept
KEPT = 512


def _key(leaves: list[Any]) -> tuple | None:
    """What a trace depends on, or None where a size is symbolic (such traces are not kept). An argument may say so itself,
    by its ``trace_key``."""
    key: list[Any] = []
    first: dict[int, int] = {}  # a trace of f(x, x) is none of f(x, y)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            if not all(isinstance(size, int) for size in (*leaf.shape, *leaf.stride())):
                return None
            same = first.setdefault(id(leaf), place)
            key.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, same))
        elif isinstance(leaf, torch.SymInt | torch.SymFloat):
            return None
        else:
            key.append((type(leaf), getattr(leaf, "trace_key", leaf)))
    return tuple(key)


def trace(
    function: Callable, args: tuple, decompositions: Decompositions | None = None, mode: FakeTensorMode | None = None
) -> Traced:
    """Graph of ``function(*args)`` over the leaves of ``args`` that are fake tensors or symbolic floats; outputs as one flat
    list. ``mode`` is that of a function without tensors."""
    leaves, spec = pytree.tree_flatten(args)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor | torch.SymFloat)]
    structure: list[pytree.TreeSpec] = []

    def flat(*tensors: torch.Tensor) -> list[Any]:
        filled = list(leaves)
        for position, tensor in zip(positions, tensors):
            filled[position] = tensor
        outputs, output_spec = pytree.tree_flatten(function(*pytree.tree_unflatten(filled, spec)))
        structure.append(output_spec)
        return outputs

    with _literally(leaves, mode):
        module = make_fx(flat, decomposition_table=decompositions)(*[leaves[i] for i in positions])
    module.graph.eliminate_dead_code()
    return Traced(module, structure[-1])


def _traced_once(
    function: Callable, args: tuple, decompositions: Decompositions | None, mode: FakeTensorMode | None
) -> Traced:
    """As ``trace``, once for arguments that look alike."""
    leaves, spec = pytree.tree_flatten(args)
    key = _key(leaves)
    if key is None:
        return trace(function, args, decompositions, mode)
    memo_key = (function, key, spec, id(decompositions))
    if memo_key in _traced:
        _traced.move_to_end(memo_key)
        return _traced[memo_key]
    traced = _traced[memo_key] = trace(function, args, decompositions, mode)
    forget_values(traced.module)
    if len(_traced) > KEPT:
        _traced.popitem(last=False)
    return traced


def forget_values(module: fx.GraphModule) -> None:
    """Keep of each node's value what it is shaped like; what is no plain tensor is inferred anew when it is spliced."""
    for node in module.graph.nodes:
        value = node.meta.pop("val", None)
        if isinstance(value, FakeTensor) and _key([value]) is not None:
            node.meta["val"] = Outline.of(value)
        node.meta.pop("tensor_meta", None)


def add_input(graph: fx.Graph, name: str, example: torch.Tensor, mode: FakeTensorMode) -> fx.Node:
    """A placeholder at the graph's insertion point, shaped as ``example``."""
    node = graph.placeholder(name)
    node.target = node.name  # generated code would confuse names that differ in case only
    with torch.no_grad(), mode:
        node.meta["val"] = shaped_like(example)
    return node


def shaped_like(example: torch.Tensor) -> torch.Tensor:
    """A tensor of the same sizes, strides, dtype and device; fake inside a fake mode."""
    return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)


@contextlib.contextmanager
def _literally(leaves: list[Any], mode: FakeTensorMode | None = None) -> Iterator[None]:
    """In the leaves' fake mode, where they have none in the given one, without autograd; composite operators by their
    Python bodies, which know symbolic sizes."""
    mode = _fake_mode(leaves) or mode
    with torch.no_grad(), enable_python_dispatcher(), mode or contextlib.nullcontext():
        yield


def mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that a graph's inputs are of."""
    return _fake_mode(node.meta.get("val") for node in graph.find_nodes(op="placeholder"))


def _fake_mode(leaves: Iterable[Any]) -> FakeTensorMode | None:
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def insert(
    graph: fx.Graph,
    function: Callable,
    *args: Any,
    decompositions: Decompositions | None = None,
    label: str = "",
    pure: bool = False,
) -> Any:
    """Write ``function(*args)`` into ``graph`` at its insertion point; ``args`` are pytrees of nodes and constants.

    Returns what the function returns, with nodes in the place of tensors. ``label`` marks each new node
    (``meta["mkor_fx"]``), so that a printed graph says whose work it is. ``pure``: it must not draw random numbers, nor
    change what it is given, as code of a rule must not.

    Raises:
        ValueError: the function reads a value on the host, holds a tensor of its own, or is not pure.
    """
    values = pytree.tree_map_only(fx.Node, fake_value, args)
    try:
        mode = _fake_mode(pytree.tree_leaves(values)) or mode_of(graph)
        traced = _traced_once(function, values, decompositions, mode)
    except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
        raise ValueError(READS.format(label=label or function.__name__)) from error
    except WrongResult as error:
        raise ValueError(f"{label}: {error}") from error
    _check_traced(traced.module, label or function.__name__, pure)
    inputs = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, fx.Node)]
    return pytree.tree_unflatten(splice(graph, traced.module, inputs, label), traced.structure)


READS = (
    "{label}: its code reads a value on the host (item(), float(), bool(), or an if on a tensor), which a compiled program "
    "cannot wait for: choose with torch.where, and keep numbers as 0-dim tensors"
)
HOLDS = (
    "{label}: its code holds a tensor of its own ({target}), which a compiled program cannot know: use plain numbers, "
    "or make "
    "it of an operand, as by x.new_full(size, value)"
)
CHANGES = (
    "{label}: its code changes what it is given in place ({target}), which others still read: compute a new tensor"
)
DRAWS = (
    "{label}: its code draws random numbers ({target}), which would be others on each rank and after a resume: use a "
    "hash of "
    "the step, as mkor_fx.prims.rademacher(step, side, size, dtype)"
)


def _check_traced(module: fx.GraphModule, label: str, pure: bool) -> None:
    for node in module.graph.nodes:
        target = node.target
        if node.op == "get_attr":
            raise ValueError(HOLDS.format(label=label, target=target))
        if target is torch.ops.aten._local_scalar_dense.default:
            raise ValueError(READS.format(label=label))
        if pure and isinstance(target, torch._ops.OpOverload):
            if torch.Tag.nondeterministic_seeded in target.tags:
                raise ValueError(DRAWS.format(label=label, target=target))
            written = [arg for arg, spec in zip(node.args, target._schema.arguments) if spec.is_write]
            if any(isinstance(arg, fx.Node) and _root(arg).op == "placeholder" for arg in written):
                raise ValueError(CHANGES.format(label=label, target=target))


def _root(node: fx.Node) -> fx.Node:
    """What a node is a view of, itself if it is none."""
    while isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns):
        node = node.args[0]  # type: ignore[assignment]
    return node


def splice(graph: fx.Graph, traced: fx.GraphModule, inputs: list[fx.Node], label: str = "") -> list[Any]:
    """Copy a traced graph behind ``inputs``; returns the nodes of its outputs."""
    environment: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    values = [fake_value(node) for node in inputs]
    mode = _fake_mode(values) or mode_of(graph)
    with _literally(values, mode):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(arguments)
            elif node.op == "call_function":
                copy = graph.node_copy(node, environment.__getitem__)
                copy.meta = {"val": _value(node, copy, mode), "mkor_fx": label}
                environment[node] = copy
            elif node.op == "output":
                return list(fx.map_arg(node.args[0], environment.__getitem__))
    raise AssertionError("traced graph without an output")


def _value(traced: fx.Node, copy: fx.Node, mode: FakeTensorMode | None) -> Any:
    """What a copied node computes: as in its trace, or inferred anew where it is a view, which shares its input's memory.

    A tensor as the trace has seen it, with memory of its own, takes a tenth of the time.
    """
    seen = traced.meta.get("val")
    if (
        mode is not None
        and isinstance(seen, Outline)
        and isinstance(traced.target, torch._ops.OpOverload)
        and not any(returned.alias_info for returned in traced.target._schema.returns)
    ):
        with torch._C._DisableTorchDispatch():
            like = torch.empty_strided(seen.shape, seen.stride, dtype=seen.dtype, device="meta")
        return FakeTensor(mode, like, seen.device)
    args, kwargs = fx.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
    return copy.target(*args, **kwargs)  # type: ignore[operator]
