"""What flows through the pipeline: a captured step, the sites found in it, and the grammar of each stage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: which dimension of the weight's matrix view the rows ``a`` (the layer's inputs) lie along
INPUTS_LAST, INPUTS_FIRST = 0, 1


@dataclass(frozen=True)
class Operand:
    """Rows ``[N, M]`` read off a node: ``view(value of node, *arguments)``. ``view`` is plain torch code."""

    node: fx.Node
    view: Callable
    arguments: tuple = ()


@dataclass(frozen=True)
class Tap:
    """One use of a weight, read off the operation that makes its gradient: ``grad_PQ = rows_P.T @ rows_Q``.

    ``matrix`` is ``(P, Q)``, or ``(E, P, Q)`` for a batch of ``E`` matrices with rows ``[E, N, P]`` and ``[E, N, Q]``.
    ``count`` is the number of rows, 0-dim or ``[E]``; ``None`` for all ``N`` of them. ``inputs`` is filled in by the
    matcher where an op table row cannot know it (``mm`` is symmetric): ``INPUTS_LAST`` for ``[O, I]`` weights,
    ``INPUTS_FIRST`` for ``[I, O]``. ``bias_grads`` are nodes that hold this use's bias gradient for certain. ``lookup``:
    ``a`` are one-hots. ``routed``: rows without a gradient take no part, and a member may have none.
    """

    node: fx.Node
    op: str
    matrix: tuple[int, ...]
    rows_first: Operand
    rows_last: Operand
    inputs: int | None = None
    count: Operand | None = None
    bias_grads: frozenset[fx.Node] = frozenset()
    lookup: bool = False
    routed: bool = False

    @property
    def a(self) -> Operand:
        return self.rows_last if self.inputs == INPUTS_LAST else self.rows_first

    @property
    def g(self) -> Operand:
        return self.rows_first if self.inputs == INPUTS_LAST else self.rows_last

    @property
    def batched(self) -> bool:
        return len(self.matrix) == 3

    def flipped(self) -> Tap:
        """The same use of the transposed weight."""
        *members, first, last = self.matrix
        swap = {INPUTS_LAST: INPUTS_FIRST, INPUTS_FIRST: INPUTS_LAST, None: None}
        return replace(
            self,
            matrix=(*members, last, first),
            rows_first=self.rows_last,
            rows_last=self.rows_first,
            inputs=swap[self.inputs],
        )


@dataclass(frozen=True)
class View:
    """How a parameter is seen as a matrix ``(P, Q)`` or as a batch of them ``(E, P, Q)``.

    ``parameter.reshape(split).permute(order).reshape(matrix)``; ``P`` holds the parameter's outermost dimension that is
    not a member's.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    matrix: tuple[int, ...]

    def see(self, x: torch.Tensor) -> torch.Tensor:
        """Shaped as the parameter -> ``matrix``"""
        return x.reshape(self.split).permute(self.order).reshape(self.matrix)

    def store(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """``matrix`` -> the parameter's own shape."""
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return x.reshape([self.split[i] for i in self.order]).permute(inverse).reshape(shape)


@dataclass(frozen=True)
class Decline:
    """Why a parameter keeps its raw gradient: ``op`` that stood in the way, the user's ``source`` line."""

    reason: str
    op: str = ""
    source: str = ""

    def __str__(self) -> str:
        """The line where an operator stood in the way; what was declined by name says so itself."""
        place = f" at {self.source}" if self.source else ""
        return self.reason + (f" [{self.op}]{place}" if self.op else "")


class Role(Enum):
    SITE = "site"
    BIAS = "bias"
    DECLINED = "declined"


@dataclass
class Parameter:
    """A trainable parameter of a captured graph.

    ``index`` is its position among the graph's inputs, ``output`` its gradient's among the joint outputs; ``excluded``
    says why it is left alone before anything is matched.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    node: fx.Node
    output: int | None
    excluded: str | None = None

    @property
    def grad(self) -> fx.Node | None:
        """The node that is returned as its gradient now: passes may replace nodes, never outputs' positions."""
        return None if self.output is None else self.node.graph.output_node().args[0][self.output]  # type: ignore


@dataclass
class Site:
    """A weight whose gradient is a product, with every use of it. ``bias`` is its bias, if matched; ``rule`` updates it.

    ``parametrized``: the products make the gradient of a function of the weight, from which its own follows elementwise.
    """

    parameter: Parameter
    taps: list[Tap]
    view: View
    parametrized: bool = False
    bias: Parameter | None = None
    rule: Any = None

    @property
    def kinds(self) -> tuple[int, ...]:
        """The orientations in which the weight is used."""
        return tuple(sorted({tap.inputs for tap in self.taps if tap.inputs is not None}))

    @property
    def matrix(self) -> tuple[int, ...]:
        return self.view.matrix

    @property
    def lookup(self) -> bool:
        """Whether it is only ever looked up."""
        return all(tap.lookup for tap in self.taps)


@dataclass
class StepGraph:
    """A joint forward and backward graph on its way through the passes.

    ``seeds`` are the gradients of the outputs (AOTAutograd's tangents): whatever depends on them is backward. ``data`` are
    the inputs that are not the model's own parameters and buffers.
    ``parameters`` are keyed by input position; after ``match`` each trainable one is a site, a bias or a decline.
    """

    module: fx.GraphModule
    inputs: list[fx.Node]
    parameters: dict[int, Parameter]
    seeds: list[fx.Node]
    data: set[fx.Node] = field(default_factory=set)
    sites: dict[int, Site] = field(default_factory=dict)
    declines: dict[int, Decline] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def returned(self, position: int) -> fx.Node:
        """What the joint graph returns at ``position``."""
        return self.output.args[0][position]  # type: ignore[index,return-value]

    def role(self, index: int) -> Role:
        if index in self.sites:
            return Role.SITE
        if any(site.bias is not None and site.bias.index == index for site in self.sites.values()):
            return Role.BIAS
        return Role.DECLINED


_NOT_THE_USERS = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_frame(node: fx.Node | None) -> tuple[str, int] | None:
    """``(path, line)`` of the user's code that made the node: its innermost frame outside torch and this library. A model
    that is made of torch's modules alone has none: of such, where the forward of the module begins."""
    if node is None:
        return None
    frames = [m for m in _FRAME.finditer(node.meta.get("stack_trace") or "") if not m["file"].startswith(_NOT_THE_USERS)]
    if frames:
        return frames[-1]["file"], int(frames[-1]["line"])
    modules = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack") or {}
    forward = getattr(list(modules.values())[-1][1], "forward", None) if modules else None
    code = getattr(forward, "__code__", None)
    return None if code is None else (code.co_filename, code.co_firstlineno)


def source_line(node: fx.Node | None) -> str:
    """:func:`source_frame` as ``file.py:12``, or ''."""
    frame = source_frame(node)
    return f"{os.path.basename(frame[0])}:{frame[1]}" if frame else ""


def product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def same_sizes(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two shapes are equal for certain: a symbolic size is not asked, which would tie the graph to the answer."""
    return len(first) == len(second) and all(statically_known_true(x == y) for x, y in zip(first, second))


def fake_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that describes what the node computes."""
    return node.meta["val"]


def verify(step: StepGraph, stage: str) -> None:
    """Hold a stage's graph to its grammar; a failure is a fault of the library, never of the user.

    Every stage: well-formed, every node that is read typed. From ``match`` on: each trainable parameter has exactly one
    role. After ``lower``: no ``mkor_fx::`` operator left.
    """
    step.graph.lint()
    for node in step.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and node.users:
            raise AssertionError(f"after {stage}: node {node} ({node.target}) has no meta['val']")
        if stage == "lower" and getattr(node.target, "namespace", None) == "mkor_fx":
            raise AssertionError(f"after lower: {node.target} was not expanded")
    if stage in ("match", "rewrite", "schedule", "lower"):
        biases = {site.bias.index for site in step.sites.values() if site.bias is not None}
        roles = [set(step.sites), biases, set(step.declines)]
        if set().union(*roles) != set(step.parameters) or sum(map(len, roles)) != len(step.parameters):
            raise AssertionError(
                f"after {stage}: sites {roles[0]}, biases {roles[1]} and declines {roles[2]} do not "
                f"divide the parameters {set(step.parameters)}"
            )
