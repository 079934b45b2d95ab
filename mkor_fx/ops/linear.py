"""Products of two matrices, of two batches of matrices, and of three."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import fx, nn

from ..ir import INPUTS_LAST, Decline, Operand, Tap, fake_value, product
from ..reasons import NO_ROW
from .rows import as_columns, as_rows, broadcast_rows, only_member, outer_rows
from .table import CASTS, VIEWS, Weight, behind, op_rule

aten = torch.ops.aten


@op_rule(
    aten.mm.default,
    covers="`nn.Linear`, `F.linear`, `x @ W`, weights stored `[in, out]`, packed projections, LSTM and GRU",
    examples=(
        lambda: (nn.Linear(3, 5), (torch.randn(7, 3),)),
        lambda: (nn.Linear(3, 5, bias=False), (torch.randn(2, 4, 3),)),
    ),
)
def linear(node: fx.Node) -> Tap | Decline:
    """``grad_PQ = x_PN @ y_NQ``: whichever operand depends on the loss gradient is ``g``, the other one ``a``."""
    x_PN, y_NQ = node.args
    matrix = fake_value(x_PN).shape[0], fake_value(y_NQ).shape[1]
    return Tap(node, "linear", matrix, Operand(x_PN, as_columns), Operand(y_NQ, as_rows))


@op_rule(
    aten.bmm.default,
    covers="`torch.bmm`, `torch.baddbmm`, `torch.einsum`; batched weights such as experts `[E, I, O]`, a factor pair each",
    examples=(
        lambda: (Weight((3, 6, 4), torch.bmm), (torch.randn(3, 5, 6),)),
        lambda: (Weight((4, 6), lambda x, w: torch.einsum("bi,oi->bo", x, w)), (torch.randn(5, 6),)),
        lambda: (Weight((3, 4, 6), lambda x, w: torch.einsum("nei,eoi->neo", x, w)), (torch.randn(5, 3, 6),)),
    ),
)
def batched_linear(node: fx.Node) -> Tap | Decline:
    """``grad_EPQ = x_EPN @ y_ENQ``; a batch of one is a plain product."""
    x_EPN, y_ENQ = node.args
    members, first, last = fake_value(x_EPN).shape[0], fake_value(x_EPN).shape[1], fake_value(y_ENQ).shape[2]
    if members == 1:
        one = Operand(x_EPN, only_member, (as_columns,)), Operand(y_ENQ, only_member, (as_rows,))
        return Tap(node, "batched_linear", (first, last), *one)
    rows = Operand(x_EPN, as_columns), Operand(y_ENQ, as_rows)
    return Tap(node, "batched_linear", (members, first, last), *rows, routed=True)


@op_rule(
    aten.sum.dim_IntList,
    covers="a weight that is expanded over a batch and multiplied by `bmm`",
    examples=(lambda: (Weight((2, 6, 5), torch.matmul), (torch.randn(3, 2, 7, 6),)),),
)
def broadcast_linear(node: fx.Node) -> Tap | Decline:
    """``grad = sum_B x_BPN @ y_BNQ``: the batch dimensions that are summed are rows."""
    view = behind(node.args[0], CASTS)
    bmm, shape = behind(view, CASTS | VIEWS), fake_value(view).shape
    lead, dims = tuple(shape[:-2]), tuple(sorted(d % len(shape) for d in node.args[1]))
    in_batch = all(d < len(lead) for d in dims)
    if bmm.target is not aten.bmm.default or product(lead) != fake_value(bmm).shape[0] or not in_batch:
        return Decline(NO_ROW)
    sizes, summed = _runs(lead, dims)
    if sizes.count(-1) > 1:
        return Decline(NO_ROW)
    members = product(n for d, n in enumerate(sizes) if d not in summed)
    x_BPN, y_BNQ = bmm.args
    return Tap(
        node,
        "broadcast_linear",
        (*((members,) if members > 1 else ()), *fake_value(bmm).shape[1:]),
        Operand(x_BPN, broadcast_rows, (as_columns, sizes, summed)),
        Operand(y_BNQ, broadcast_rows, (as_rows, sizes, summed)),
        routed=members > 1,
    )


def _runs(lead: tuple[int, ...], dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A batch with neighbouring summed dimensions as one, and which are summed; -1 for a size that is symbolic."""
    runs = [(own, [n for _, n in run]) for own, run in groupby(enumerate(lead), lambda item: item[0] in dims)]
    sizes = [(own, n) for own, run in runs for n in ([product(run)] if own else run)]
    return tuple(n if isinstance(n, int) else -1 for _, n in sizes), tuple(i for i, (own, _) in enumerate(sizes) if own)


@op_rule(
    aten._trilinear.default,
    covers="`nn.Bilinear`: its input is the outer product of the two",
    examples=(lambda: (nn.Bilinear(4, 3, 5), (torch.randn(7, 4), torch.randn(7, 3))),),
)
def bilinear(node: fx.Node) -> Tap | Decline:
    """``grad_OIJ = sum_n g_NO x_NI y_NJ``: ``a`` are the outer products, ``[N, I * J]``."""
    x_NI, g_NO, y_NJ, *dims = node.args
    if dims[:4] != [[1, 3], [2, 3], [1, 2], [0]]:
        return Decline(NO_ROW)
    matrix = fake_value(g_NO).shape[1], fake_value(x_NI).shape[1] * fake_value(y_NJ).shape[1]
    return Tap(node, "bilinear", matrix, Operand(g_NO, as_rows), Operand(x_NI, outer_rows, (y_NJ,)), INPUTS_LAST)
