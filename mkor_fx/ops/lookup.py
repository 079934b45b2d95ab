"""Products whose rows are looked up or routed: embeddings, and experts that see the tokens given to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from ..ir import INPUTS_FIRST, Decline, Operand, Tap, fake_value
from ..reasons import FREQUENCY, MASKED, NO_ROW
from .rows import (
    as_columns,
    as_rows,
    count_gathered,
    count_segments,
    flat_rows,
    gathered_rows,
    looked_up,
    not_padding,
    one_hot_rows,
    segment_rows,
)
from .table import CASTS, VIEWS, Weight, behind, op_rule

aten = torch.ops.aten


@op_rule(
    aten.embedding_dense_backward.default,
    covers="`nn.Embedding`, `F.embedding`; rows of `padding_idx` leave both statistics",
    examples=(
        lambda: (nn.Embedding(6, 3, padding_idx=1), (torch.randint(0, 6, (4, 5)),)),
        lambda: (nn.Embedding(6, 3), (torch.randint(0, 6, (4, 5)),)),
    ),
)
def embedding(node: fx.Node) -> Tap | Decline:
    """``a_NV``: one-hots (never made: their sum is a histogram); ``g_ND``. Rows of ``padding_idx`` leave both."""
    grad, indices, size, padding_idx, by_frequency = node.args
    if by_frequency:
        return Decline(FREQUENCY)
    return _lookup(node, grad, indices, size, padding_idx)


def _lookup(node: fx.Node, grad: fx.Node, indices: fx.Node, size: int, padding_idx: int = -1) -> Tap:
    value, padded = fake_value(grad), padding_idx >= 0
    return Tap(
        node,
        "embedding",
        (size, value.shape[-1]),
        rows_first=Operand(indices, one_hot_rows, (size, padding_idx, value.dtype)),
        rows_last=Operand(grad, looked_up, (indices, padding_idx)) if padded else Operand(grad, flat_rows),
        inputs=INPUTS_FIRST,
        count=Operand(indices, not_padding, (padding_idx,)) if padded else None,
        lookup=True,
    )


@op_rule(
    aten.index_put.default,
    covers="a table read by `W[ids]`; experts gathered for each token, `bmm(x, W[ids])`",
    examples=(
        lambda: (Weight((7, 4), lambda ids, w: w[ids]), (torch.randint(0, 7, (3, 5)),)),
        lambda: (
            Weight((3, 6, 4), lambda x, w: torch.bmm(x, w[torch.tensor([0, 2, 2, 0, 2])])),
            (torch.randn(5, 2, 6),),
        ),
    ),
)
def gathered(node: fx.Node) -> Tap | Decline:
    """``grad[ids[n]] += value[n]``: one row of a table each, or one product ``x_n.T @ y_n`` each."""
    _, indices, value, *accumulate = node.args
    if accumulate != [True] or len(indices) != 1 or fake_value(indices[0]).is_floating_point():
        return Decline(NO_ROW)
    ids, size = indices[0], fake_value(node).shape[0]
    if fake_value(ids).dtype == torch.bool:
        return Decline(MASKED)
    if fake_value(node).dim() == 2:
        return _lookup(node, value, ids, size)
    bmm = behind(value, CASTS | VIEWS)
    each = fake_value(value).shape[-2:]
    if bmm.target is not aten.bmm.default or fake_value(bmm).shape != (fake_value(ids).numel(), *each):
        return Decline(NO_ROW)
    x_SPN, y_SNQ = bmm.args
    return Tap(
        node,
        "gathered_linear",
        (size, *each),
        Operand(x_SPN, gathered_rows, (as_columns, ids, size)),
        Operand(y_SNQ, gathered_rows, (as_rows, ids, size)),
        count=Operand(ids, count_gathered, (fake_value(x_SPN).shape[2], size)),
    )


@op_rule(
    aten._grouped_mm.default,
    covers="`torch._grouped_mm` over tokens sorted by expert",
    examples=(
        lambda: (
            Weight((3, 8, 16), lambda x, w: torch._grouped_mm(x, w, offs=torch.tensor([2, 2, 6], dtype=torch.int32))),
            (torch.randn(6, 8).bfloat16(),),
        ),
    ),
)
def grouped_linear(node: fx.Node) -> Tap | Decline:
    """``grad_e = x[:, e's columns] @ y[e's rows]``, ``offs`` where each member ends."""
    x_PN, y_NQ, ends = (*node.args, *node.kwargs.values())[:3]
    if fake_value(x_PN).dim() != 2 or fake_value(y_NQ).dim() != 2:
        return Decline(NO_ROW)
    return _segments(node, x_PN, as_columns, y_NQ, ends)


@op_rule(
    "transformers.grouped_mm_fallback_backward.default",
    output=1,
    covers="experts of transformers' models where `torch._grouped_mm` does not run",
)
def grouped_linear_of_transformers(node: fx.Node) -> Tap | Decline:
    """``[E, I, O]`` from ``(input [N, I], weight, ends [E], grad_output [N, O])``"""
    x_NI, _, ends, g_NO = node.args
    return _segments(node, x_NI, as_rows, g_NO, ends)


def _segments(node: fx.Node, first: fx.Node, view: Callable, last: fx.Node, ends: fx.Node) -> Tap:
    sizes = [fake_value(first).shape[0 if view is as_columns else 1], fake_value(last).shape[1]]
    return Tap(
        node,
        "grouped_linear",
        (fake_value(ends).shape[0], *sizes),
        Operand(first, segment_rows, (view, ends)),
        Operand(last, segment_rows, (as_rows, ends)),
        count=Operand(ends, count_segments),
    )
