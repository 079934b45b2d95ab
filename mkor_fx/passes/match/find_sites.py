"""Give every trainable parameter a role: a site with all its uses, a site's bias, or a decline with its reason."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ... import reasons
from ...ir import Decline, Parameter, Site, StepGraph, Tap, fake_value, product, same_sizes, source_line
from ...ops import CASTS, VIEWS
from ..core import graph_pass
from .boxes import Box, merge, view_of
from .pieces import Piece, PlacedTap, on_whole, pieces, where
from .uses import read_uses

aten = torch.ops.aten

#: beside pointwise operators, what a function of a weight may consist of for its gradient to be followed through
LINEAR_IN_GRADIENT = {
    *CASTS,
    *VIEWS,
    aten.permute.default,
    aten.expand.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten._weight_norm_interface_backward.default,
}


@graph_pass(stage="match", exact=True)
def find_sites(step: StepGraph) -> None:
    """Divide ``step.parameters`` into sites (with their biases) and declines. Reads the graph, changes nothing."""
    backward, of_data = downstream(step.seeds), downstream(step.data)
    functions = WeightFunctions(of_data)
    uses: dict[int, list[PlacedTap]] = {}
    for index, parameter in step.parameters.items():
        found = read_weight(parameter, backward, of_data)
        behind = functions.read(parameter, backward) if isinstance(found, Decline) else None
        if behind is None and isinstance(found, Decline):
            step.declines[index] = found
            continue
        uses[index] = behind or found  # type: ignore[assignment]
        taps = [on_whole(use) for use in uses[index]]
        for tap in taps:
            check_inputs(tap, parameter)
        view = view_of(*uses[index][0].whole)
        assert view is not None
        step.sites[index] = Site(parameter, taps, view, parametrized=behind is not None)
    for index, parameter in step.parameters.items():
        looked_up = index in step.sites and step.sites[index].lookup
        if parameter.excluded is None and (index in step.declines or looked_up):
            owner = find_bias_owner(step, parameter, uses)
            if owner is not None:
                owner.bias = parameter
                step.declines.pop(index, None), step.sites.pop(index, None)


def downstream(seeds: list[fx.Node] | set[fx.Node]) -> set[fx.Node]:
    """Every node that depends on one of ``seeds``, themselves included."""
    reached, stack = set(seeds), list(seeds)
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached.add(user)
                stack.append(user)
    return reached


def read_weight(
    parameter: Parameter, backward: set[fx.Node], of_data: Collection[fx.Node] = ()
) -> list[PlacedTap] | Decline:
    """All uses of a weight, or the reason why it has none. One term that does not match declines the weight."""
    if parameter.excluded is not None:
        return Decline(parameter.excluded)
    if parameter.grad is None:
        return Decline(reasons.UNUSED)
    if len(parameter.shape) < 2:
        return Decline(reasons.VECTOR, *where(parameter.grad))
    if not fake_value(parameter.node).is_floating_point():
        return Decline(reasons.DTYPE.format(dtype=fake_value(parameter.node).dtype), *where(parameter.grad))
    if not product(parameter.shape):
        return Decline(reasons.EMPTY)
    return read_uses(parameter.grad, parameter.shape, backward, of_data)


class WeightFunctions:
    """Weights that act through a function of them alone: a norm, a mask, a scale, an element-wise parametrization.

    The products make the gradient of the function's value, and the weight's own follows from it element by element: then
    the statistics are those of the products, and what they precondition is the weight's own gradient.
    """

    def __init__(self, of_data: set[fx.Node]) -> None:
        self._of_data = of_data

    def read(self, parameter: Parameter, backward: set[fx.Node]) -> list[PlacedTap] | None:
        if parameter.excluded is not None or parameter.grad is None or len(parameter.shape) < 2:
            return None
        uses: list[PlacedTap] = []
        stack, seen = [parameter.grad], {parameter.grad}
        while stack:
            node = stack.pop()
            if node not in backward:
                if node in self._of_data:
                    return None
                continue
            found = self._products(node, parameter.shape, backward)
            if found is not None:
                uses += found
            elif not self._followed(node):
                return None
            else:
                stack += [arg for arg in node.all_input_nodes if arg not in seen]
                seen.update(node.all_input_nodes)
        return uses if len({use.whole for use in uses}) == 1 else None

    def _products(self, node: fx.Node, shape: tuple[int, ...], backward: set[fx.Node]) -> list[PlacedTap] | None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not same_sizes(value.shape, shape) or not value.is_floating_point():
            return None
        found = read_uses(node, shape, backward, self._of_data)
        return None if isinstance(found, Decline) else found

    def _followed(self, node: fx.Node) -> bool:
        if getattr(node.target, "__name__", "") == "getitem":
            return True
        target = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        return pointwise or target in LINEAR_IN_GRADIENT


def check_inputs(tap: Tap, parameter: Parameter) -> None:
    """Fake tensors multiply integers with floats, real ones do not: say it now.

    Raises:
        ValueError: the layer's input has another dtype than its output's gradient.
    """
    a, g = fake_value(tap.a.node).dtype, fake_value(tap.g.node).dtype
    if not tap.lookup and a != g:
        place = source_line(tap.node) or str(tap.node.target)
        raise ValueError(
            f"{parameter.name} multiplies an input of {a} where {g} is needed, at {place}: gradients need floating-point "
            f"inputs; convert it, for instance with x.to({g})"
        )


def find_bias_owner(step: StepGraph, parameter: Parameter, uses: dict[int, list[PlacedTap]]) -> Site | None:
    """The site of whose output gradient this parameter's is the row sum, in every one of its terms."""
    if parameter.grad is None or not product(parameter.shape):
        return None
    owners = [_owner_of(step, piece, uses) for piece in pieces(parameter.grad, Box.whole(parameter.shape))]
    if not owners or owners[0] is None or any(owner != owners[0] for owner in owners):
        return None
    owner = step.sites[owners[0]]
    return owner if owner.bias is None else None


def _owner_of(step: StepGraph, piece: Piece, uses: dict[int, list[PlacedTap]]) -> int | None:
    """The input position of the weight one of whose uses sums its output gradients into this piece."""
    axes = merge(axis for dim in piece.box.dims for axis in dim)
    for index, own in uses.items():
        if index not in step.sites:
            continue
        for use in own:
            if use.tap.inputs != step.sites[index].kinds[0] or piece.node not in use.tap.bias_grads:
                continue
            outputs = (*use.members, *use.outputs)
            if use.partial:
                same = [(a.size, a.start, a.full) for a in outputs] == [(a.size, a.start, a.full) for a in axes]
            else:  # the whole bias, in the same order
                whole = len(axes) <= 1 and not any(axis.partial for axis in axes)
                same = whole and product(a.size for a in axes) == product(a.size for a in outputs)
            if same:
                return index
    return None
