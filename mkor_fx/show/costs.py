"""What the update of one weight costs: counted from the rule's own code, not measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import tabulate
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from ..ir import Operand, Site, fake_value
from ..passes.lower.expand import lowering_table
from ..passes.match.layout import Layout
from ..passes.torch_api.backend import new_fake_mode
from ..passes.torch_api.tracing import trace
from ..rules import Gradient, Rule, Shape, Use
from ..rules.direction import direction_of, product_dtype_of

#: the gradient is formed, then ``L @ G @ R``; `order_products` takes another where that is cheaper and may be
PRODUCT_FIRST = "product first"
#: that a refresh is counted for where no batch is known
ROWS = 1024


class Work(NamedTuple):
    """What costs depend on. ``rows``: of one member, over all uses (None: symbolic, or dealt out by the data).

    The rule of ``layout`` is as at step 0. ``operand_bytes``: what the statistics read.
    """

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    rows: int | None
    operand_bytes: int | None

    @classmethod
    def of(cls, site: Site) -> Work:
        operands = [operand for tap in site.taps for operand in (tap.a, tap.g)]
        counts = [_row_count(tap.g) for tap in site.taps]
        rows = None if None in counts else _static(sum(counts))
        size = _static(sum(fake_value(o.node).numel() * fake_value(o.node).element_size() for o in operands))
        layout = Layout.of(site)
        plain = replace(layout, rule=layout.rule.at_first_step)
        weight = fake_value(site.parameter.node)
        return cls(plain, weight.dtype, weight.device, rows, size)


@dataclass(frozen=True)
class Costs:
    """Counts of one weight and its bias, all members of a batched one. A multiply-add is two flops.

    Bytes are what has to be read and written, once. ``layer_flops``: forward and backward of the weight itself, ``6 N O I``
    (0 for a lookup), to compare with. ``refresh``: statistics, whose rows are taken for plain ones, and the factors' update.
    ``cheapest``: the order of the products with the fewest multiply-adds, see :func:`orders`; a compiled step takes it where
    the gradient is one product that is neither reduced nor clipped nor accumulated. None or '' where it depends on the data.
    ``products``: the dtype of the products that make the direction.
    """

    rows: int | None
    layer_flops: int | None
    refresh_flops: int
    refresh_bytes: int
    precondition_flops: int
    precondition_bytes: int
    cheapest: str
    products: str


@functools.lru_cache(maxsize=4096)
def count_costs(work: Work) -> Costs:
    """Costs of a weight under its rule, from traces of ``update`` and of what makes its direction, with every operator
    expanded. What ``derive`` does is not in them."""
    layout, rows = work.layout, work.rows
    rule, shape, members = layout.rule, layout.shape, layout.members or 1
    with torch.no_grad(), new_fake_mode():
        state = rule.init(shape, torch.device("cpu"))
        gradient = torch.empty(shape.O, shape.I, dtype=work.dtype)
        bias = torch.empty(shape.O, dtype=work.dtype) if shape.bias else None
        uses = [layout.shape_of_use(kind) for kind in layout.kinds]
        read: dict[str, Any] = {"state": state} if rule.reads_state else {}
        read |= {"key": torch.empty((), dtype=torch.int64)} if rule.draws else {}
        summaries = _summarize(rule, uses, 1, read)
        counts, step = [torch.empty(()) for _ in uses], torch.empty((), dtype=torch.int64)
    each = 0 if rows is None else rows // len(uses)
    statistics = _count(_summarize, rule, uses, each, read)[0] if each and not shape.lookup else 0
    refresh = _count(_refresh, rule, state, summaries, counts, gradient, bias, step)
    precondition = _count(_precondition, rule, state, gradient, bias, step)
    left, right = (side is not None for side in layout.sides)
    known = rows is not None and not shape.lookup and not (rule.overrides("precondition") or rule.overrides("moment"))
    macs = orders(shape, rows, left, right) if known else {}  # type: ignore[arg-type]
    return Costs(
        rows,
        0 if shape.lookup else None if rows is None else 6 * members * rows * shape.O * shape.I,
        members * (refresh[0] + statistics),
        members * refresh[1] + (work.operand_bytes or 0) * any(map(len, summaries)),
        members * precondition[0],
        members * precondition[1],
        min(macs, key=macs.__getitem__) if macs else "",
        _products(rule, work),
    )


def _products(rule: Rule, work: Work) -> str:
    """The name of a dtype; where it is not the one that was asked for, why."""
    dtype = product_dtype_of(rule.product_dtype, work.dtype, work.device)
    declined = rule.product_dtype == "fast" and dtype == torch.float32
    name = str(dtype).removeprefix("torch.")
    return f"{name} ({work.device.type} without instructions for bfloat16)" if declined else name


@functools.lru_cache(maxsize=4096)
def refresh_flops(rule: Rule, shape: Shape) -> int:
    """Of a refresh of one matrix where no batch is known, under a rule as it is at step 0: statistics of ``ROWS`` rows, the
    state's update, and ``d^3`` for each matrix of ``d`` rows where the rule derives something."""
    with torch.no_grad(), new_fake_mode():
        state = rule.init(shape, torch.device("cpu"))
        if not state:
            return 0
        gradient = torch.empty(shape.O, shape.I)
        read: dict[str, Any] = {"state": state} if rule.reads_state else {}
        read |= {"key": torch.empty((), dtype=torch.int64)} if rule.draws else {}
        summaries = _summarize(rule, [shape], 1, read)
        count, step = torch.empty(()), torch.empty((), dtype=torch.int64)
    statistics, _ = _count(_summarize, rule, [shape], ROWS, read)
    update, _ = _count(_refresh, rule, state, summaries, [count], gradient, None, step)
    derived = sum(t.shape[-1] ** 3 for t in state.values() if t.dim() > 1) if rule.overrides("derive") else 0
    return statistics + update + derived


def orders(shape: Shape, rows: int, left: bool, right: bool) -> dict[str, int]:
    """Multiply-adds of gradient and preconditioning in each order, for one matrix with the factors it has.

    ``L @ (g.T @ a) @ R = (g @ L).T @ (a @ R)``: a factor can multiply the product, or its operand of ``N`` rows. Without
    what the rescale needs: where no product is formed, the norm of the gradient costs up to ``N^2 (O + I)`` more.
    """
    o, i, n = shape.O, shape.I, rows
    left_on = {"product": o * o * i, "operand": n * o * o} if left else {"": 0}
    right_on = {"product": o * i * i, "operand": n * i * i} if right else {"": 0}
    named = {}
    for l_at, l_macs in left_on.items():
        for r_at, r_macs in right_on.items():
            early = [name for name, at in (("L on g", l_at), ("R on a", r_at)) if at == "operand"]
            name = "operands first" if len(early) == left + right > 1 else ", ".join(early) or PRODUCT_FIRST
            named[name] = n * o * i + l_macs + r_macs
    return named if left or right else {}


def cost_table(known: dict[str, Costs]) -> str:
    """One line a weight, and what they cost together."""
    rows = [
        [
            name,
            c.rows if c.rows is not None else "dynamic",
            *(short(n) for n in (c.refresh_flops, c.refresh_bytes, c.precondition_flops, c.precondition_bytes)),
            c.cheapest,
        ]
        for name, c in known.items()
    ]
    headers = ["weight", "rows", "refresh flops", "bytes", "precond. flops", "bytes", "fewest flops"]
    layers = [c.layer_flops for c in known.values()]
    own = "not known before the batch is" if None in layers else short(sum(n for n in layers if n is not None))
    return (
        aligned(rows, headers, "lrrrrrl")
        + f"\na refresh {short(sum(c.refresh_flops for c in known.values()))} flops, preconditioning "
        f"{short(sum(c.precondition_flops for c in known.values()))} flops a step; "
        f"forward and backward of these weights {own}"
        + "".join(f"\ndirections are multiplied in {dtype}" for dtype in dict.fromkeys(c.products for c in known.values()))
    )


def aligned(rows: list, headers: list[str], sides: str) -> str:
    """A table as the library prints them; ``sides`` is a letter for each column, l or r."""
    alignment = ["left" if letter == "l" else "right" for letter in sides] if rows else None
    return tabulate.tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=alignment)


def short(number: float | None, unit: str = "") -> str:
    """``1_234_567 -> "1.23 M"``, with a unit behind it; '' for None."""
    if number is None:
        return ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            break
        number /= 1000
    digits = (
        f"{number:.0f}" if not prefix or number >= 99.95 else f"{number:.2f}" if number < 9.995 else f"{number:.1f}"
    )
    return f"{digits} {prefix}{unit}".rstrip()


def _summarize(rule: Rule, uses: list[Shape], rows: int, read: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    return [rule.summarize(use, torch.empty(rows, use.I), torch.empty(rows, use.O), **read) for use in uses]


def _refresh(rule: Rule, state: dict, summaries: list, rows: list, grad: Tensor, bias: Any, step: Tensor) -> Any:
    uses = [Use(summary, count, opposite=i > 0) for i, (summary, count) in enumerate(zip(summaries, rows))]
    return rule.update(state, uses, Gradient(grad, bias), step)


def _precondition(rule: Rule, state: dict, grad: Tensor, bias: Any, step: Tensor) -> Any:
    gradient = Gradient(grad, bias)
    advanced = rule.advance(state, gradient, step) if rule.overrides("advance") else state
    direction, new = direction_of(rule, advanced, gradient, rule.graft)
    return direction.tensors(), [t for name, t in new.items() if t is not state[name]]


def _count(function: Callable, *args: Any) -> tuple[int, int]:
    """``(flops, bytes)`` of a function of tensors: bytes of each operand that it reads and each result, once."""
    graph = trace(function, args, lowering_table(inductor=False)).module.graph
    read = {n for n in graph.find_nodes(op="placeholder") if n.users}
    made = {n for n in pytree.tree_leaves(graph.output_node().args) if isinstance(n, fx.Node)}
    size = sum(fake_value(n).numel() * fake_value(n).element_size() for n in read | made)
    return sum(_flops(node) for node in graph.nodes if node.op == "call_function"), size


def _flops(node: fx.Node) -> int:
    operands = [_numel(n) for n in node.all_input_nodes]
    if not operands or not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return 0
    if (formula := flop_registry.get(node.target.overloadpacket)) is not None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), fake_value)
        return formula(*args, **kwargs, out_val=fake_value(node))
    return max([*operands, _numel(node)])


def _numel(node: fx.Node) -> int:
    """Elements of the largest of its values."""
    return max((value.numel() for value in pytree.tree_leaves(fake_value(node)) if isinstance(value, Tensor)), default=1)


def _row_count(operand: Operand) -> Any:
    """``N`` of an operand's rows, of each member; symbolic where its sizes are, None where the data deal rows to members."""
    arguments = pytree.tree_map_only(fx.Node, fake_value, operand.arguments)
    value = fake_value(operand.node)
    with torch.no_grad(), value.fake_mode:  # a view may make tensors of its own
        rows = operand.view(value, *arguments)
    sizes = _static(rows.numel()), _static(value.numel())
    dealt_out = rows.dim() == 3 and None not in sizes and sizes[0] > sizes[1]
    return None if dealt_out else rows.shape[-2]


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None
