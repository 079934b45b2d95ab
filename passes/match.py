"""Find each weight's gradient, read its taps off the op table, and give every trainable parameter a role."""

from __future__ import annotations

import torch
from torch import fx

from ..ir import (
    INPUTS_FIRST,
    INPUTS_LAST,
    Decline,
    Operand,
    Parameter,
    Site,
    StepGraph,
    Tap,
    fake_value,
    source_line,
)
from ..ops import TABLE
from .canonicalize import is_transpose
from .core import graph_pass

aten = torch.ops.aten

#: a gradient passes through these unchanged but for its dtype or memory
CASTS = {
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    torch.ops.prims.convert_element_type.default,
}
#: these keep the order of the elements
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}


@graph_pass(stage="match", exact=True)
def find_sites(step: StepGraph) -> None:
    """Divide ``step.parameters`` into sites (with their biases) and declines. Reads the graph, changes nothing."""
    backward = downstream(step.seeds)
    for parameter in step.parameters.values():
        found = read_weight(parameter, backward)
        if isinstance(found, Decline):
            step.declines[parameter.index] = found
        else:
            step.sites[parameter.index] = Site(parameter, found)
    for index, parameter in step.parameters.items():
        if index in step.declines and parameter.excluded is None and (owner := find_bias_owner(step, parameter)):
            owner.bias = parameter
            del step.declines[index]


def downstream(seeds: list[fx.Node]) -> set[fx.Node]:
    """Every node that depends on one of ``seeds``, themselves included."""
    reached, stack = set(seeds), list(seeds)
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached.add(user)
                stack.append(user)
    return reached


def read_weight(parameter: Parameter, backward: set[fx.Node]) -> list[Tap] | Decline:
    """All taps of a weight, or the reason why it has none. One summand that does not match declines the weight."""
    if parameter.excluded is not None:
        return Decline(parameter.excluded)
    if parameter.grad is None:
        return Decline("no gradient reaches it in this graph")
    if len(parameter.shape) < 2:
        return Decline("a vector, and not the bias of a matched weight", *_where(parameter.grad))
    if not fake_value(parameter.node).is_floating_point():
        return Decline(f"no rule for {fake_value(parameter.node).dtype} weights", *_where(parameter.grad))
    taps: list[Tap] = []
    for summand in summands(parameter.grad):
        tap = read_summand(summand, parameter.shape)
        if isinstance(tap, Tap):
            tap = assign_roles(tap, backward)
        if isinstance(tap, Decline):
            return tap
        check_inputs(tap, parameter)
        taps.append(tap)
    if all(tap.op == "embedding" for tap in taps):
        return Decline("an embedding that no matrix product shares", *_where(taps[0].node))
    if len({tap.matrix for tap in taps}) > 1:
        return Decline(
            f"its uses read it as different matrices: {sorted({tap.matrix for tap in taps})}", *_where(taps[-1].node)
        )
    return taps


def summands(grad: fx.Node) -> list[fx.Node]:
    """The terms of a gradient: split at every addition of equal shapes, looking through casts."""
    node = through(grad, CASTS)
    if (
        node.target is aten.add.Tensor
        and not node.kwargs
        and all(isinstance(arg, fx.Node) and fake_value(arg).shape == fake_value(node).shape for arg in node.args)
    ):
        return [term for arg in node.args for term in summands(arg)]
    return [node]


def through(node: fx.Node, targets: set) -> fx.Node:
    """The node behind a chain of one-input ops."""
    while node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node


def read_summand(node: fx.Node, shape: tuple[int, ...]) -> Tap | Decline:
    """Walk back through casts, views and transposes to the op that makes the product, and read it.

    ``needed`` is the matrix shape that a transpose on the way has fixed for what lies behind it.
    """
    flipped, needed = False, None
    while True:
        if node.target in CASTS or node.target in VIEWS:
            node = node.args[0]
        elif is_transpose(node):
            here = tuple(fake_value(node).shape)
            if needed not in (None, here):
                return Decline("its gradient is transposed between reshapes", *_where(node))
            flipped, needed, node = not flipped, here[::-1], node.args[0]
        else:
            break
    producer, output = node, None
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        producer, output = node.args
    row = TABLE.get(producer.target) if isinstance(producer.target, torch._ops.OpOverload) else None
    if row is None or row.output != output:
        return Decline("no row of the op table reads the operation that makes its gradient", *_where(node))
    tap = row.read(producer)
    if isinstance(tap, Decline):
        return Decline(tap.reason, *_where(producer))
    if needed not in (None, tap.matrix):
        return Decline("its gradient is transposed between reshapes", *_where(node))
    if flipped:
        swap = {INPUTS_LAST: INPUTS_FIRST, INPUTS_FIRST: INPUTS_LAST, None: None}
        tap = Tap(
            tap.node,
            tap.op,
            tap.matrix[::-1],
            tap.rows_last,
            tap.rows_first,
            swap[tap.inputs],
            tap.count,
            tap.bias_grads,
        )
    leading = {_product(shape[:split]) for split in range(len(shape) + 1)}
    if tap.matrix[0] not in leading or _product(shape) != _product(tap.matrix):
        return Decline(f"its gradient is made as {tap.matrix}, which is no matrix view of {shape}", *_where(producer))
    return tap


def assign_roles(tap: Tap, backward: set[fx.Node]) -> Tap | Decline:
    """``g`` depends on the loss gradient, ``a`` does not: says which is which, and checks what a row has said."""
    depends = (tap.rows_first.node in backward, tap.rows_last.node in backward)
    inputs = {(True, False): INPUTS_LAST, (False, True): INPUTS_FIRST}.get(depends)
    if inputs is None or tap.inputs not in (None, inputs):
        which = "both operands depend" if all(depends) else "the operands do not depend as expected"
        return Decline(f"{which} on the gradient of the loss", *_where(tap.node))
    return Tap(tap.node, tap.op, tap.matrix, tap.rows_first, tap.rows_last, inputs, tap.count, tap.bias_grads)


def check_inputs(tap: Tap, parameter: Parameter) -> None:
    """Fake tensors multiply integers with floats, real ones do not: say it now.

    Raises:
        ValueError: the layer's input has another dtype than its output's gradient.
    """
    a, g = fake_value(tap.a.node).dtype, fake_value(tap.g.node).dtype
    if tap.op != "embedding" and a != g:
        where = source_line(tap.node) or str(tap.node.target)
        raise ValueError(
            f"{parameter.name} multiplies an input of {a} where {g} is needed, at {where}: gradients need floating-point "
            f"inputs; convert it, for instance with x.to({g})"
        )


def find_bias_owner(step: StepGraph, parameter: Parameter) -> Site | None:
    """The site whose output gradient this vector's gradient is the row sum of, in every one of its terms."""
    if parameter.grad is None or len(parameter.shape) != 1:
        return None
    owners = [_owner_of_term(step, term) for term in summands(parameter.grad)]
    first = owners[0]
    if first is None or first.bias is not None or any(owner is not first for owner in owners):
        return None
    outputs = first.matrix[0] if INPUTS_LAST in first.kinds else first.matrix[1]
    return first if parameter.shape == (outputs,) else None


def _owner_of_term(step: StepGraph, term: fx.Node) -> Site | None:
    node = through(term, VIEWS | CASTS)
    for site in step.sites.values():
        orientation = site.kinds[0]
        for tap in site.taps:
            if tap.inputs != orientation:
                continue
            if node in tap.bias_grads or (_is_sum_over_rows(node) and _same_rows(node.args[0], tap.g)):
                return site
    return None


def _is_sum_over_rows(node: fx.Node) -> bool:
    if node.target is not aten.sum.dim_IntList or not isinstance(node.args[0], fx.Node):
        return False
    rank = fake_value(node.args[0]).dim()
    return {d % rank for d in node.args[1]} == set(range(rank - 1))


def _same_rows(summed: fx.Node, g: Operand) -> bool:
    rows = g.node
    if g.view.__name__ == "as_columns":
        if not is_transpose(rows):
            return False
        rows = rows.args[0]
    return _behind_row_views(summed) is _behind_row_views(rows)


def _behind_row_views(node: fx.Node) -> fx.Node:
    """The node behind reshapes that only flatten or split leading dimensions, and casts."""
    while node.target in CASTS or (
        node.target in VIEWS
        and fake_value(node).dim()
        and fake_value(node.args[0]).dim()
        and fake_value(node.args[0]).shape[-1] == fake_value(node).shape[-1]
    ):
        node = node.args[0]
    return node


def _where(node: fx.Node) -> tuple[str, str]:
    if getattr(node.target, "__name__", "") == "getitem":
        node = node.args[0]
    return str(node.target), source_line(node)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
