"""The op table: one row per operation that makes a weight gradient. Adding an op is adding a row.

A row reads ``grad_PQ = rows_P.T @ rows_Q`` off a node and returns a :class:`~mkor_fx.ir.Tap`, or a
:class:`~mkor_fx.ir.Decline` that says why it cannot. ``examples`` build small layers whose gradient is made by the op;
the tests hold every row to one identity on them: ``rows_P.T @ rows_Q`` equals autograd's gradient, and ``a`` equals the
layer's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .ir import INPUTS_FIRST, INPUTS_LAST, Decline, Operand, Tap, fake_value
from .prims import one_hot_rows, unfold_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """``read`` turns a node of this op into a tap; ``output`` is which of its results is the weight's gradient."""

    name: str
    read: Callable[[fx.Node], Tap | Decline]
    output: int | None
    examples: tuple[Callable[[], tuple[nn.Module, tuple]], ...]


#: operator -> row
TABLE: dict[torch._ops.OpOverload, Row] = {}


def op_rule(
    op: torch._ops.OpOverload, *, output: int | None = None, examples: tuple[Callable, ...] = ()
) -> Callable[[Callable], Callable]:
    """Add the decorated ``read(node) -> Tap | Decline`` to the table as the row of ``op``."""

    def register(read: Callable) -> Callable:
        TABLE[op] = Row(read.__name__, read, output, tuple(examples))
        return read

    return register


# ---- views of operands, plain torch ---------------------------------------------------------------------------------


def as_rows(x_NM: Tensor) -> Tensor:
    return x_NM


def as_columns(x_MN: Tensor) -> Tensor:
    return x_MN.permute(1, 0)


def positions(grad_BOHW: Tensor) -> Tensor:
    """``[B, O, *spatial] -> [B * positions, O]``"""
    return grad_BOHW.flatten(2).permute(0, 2, 1).reshape(-1, grad_BOHW.shape[1])


def flat_rows(x: Tensor) -> Tensor:
    """``[*, M] -> [N, M]``"""
    return x.reshape(-1, x.shape[-1])


def looked_up(grad: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    """``[*, D] -> [N, D]``, rows of ``padding_idx`` set to zero."""
    rows = flat_rows(grad)
    return torch.where((indices.reshape(-1, 1) == padding_idx), torch.zeros_like(rows), rows)


def not_padding(indices: Tensor, padding_idx: int) -> Tensor:
    """How many rows are not padding, 0-dim."""
    return (indices != padding_idx).sum()


# ---- the rows -------------------------------------------------------------------------------------------------------


@op_rule(
    aten.mm.default,
    examples=(
        lambda: (nn.Linear(3, 5), (torch.randn(7, 3),)),
        lambda: (nn.Linear(3, 5, bias=False), (torch.randn(2, 4, 3),)),
    ),
)
def linear(node: fx.Node) -> Tap | Decline:
    """``grad_PQ = x_PN @ y_NQ``: whichever operand depends on the loss gradient is ``g``, the other one ``a``."""
    x_PN, y_NQ = node.args
    first, last = fake_value(x_PN).shape[0], fake_value(y_NQ).shape[1]
    return Tap(node, "linear", (first, last), Operand(x_PN, as_columns), Operand(y_NQ, as_rows))


@op_rule(
    aten.convolution_backward.default,
    output=1,
    examples=(
        lambda: (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (torch.randn(2, 2, 7, 8),)),
        lambda: (nn.Conv2d(2, 3, 1, bias=False), (torch.randn(2, 2, 4, 4),)),
    ),
)
def conv2d(node: fx.Node) -> Tap | Decline:
    """``a_NI``: unfolded patches, ``N = B*H_out*W_out``, ``I = C*kh*kw``; ``g_NO``: ``O`` output channels."""
    grad, images, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
    shape = fake_value(weight).shape
    if transposed:
        return Decline("transposed convolutions have no row yet")
    if groups != 1:
        return Decline(f"grouped convolutions (groups={groups}) have no row yet")
    if len(shape) != 4:
        return Decline(f"{len(shape) - 2}-d convolutions have no row yet")
    geometry = (tuple(shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    return Tap(
        node,
        "conv2d",
        (shape[0], shape[1] * shape[2] * shape[3]),
        rows_first=Operand(grad, positions),
        rows_last=Operand(images, unfold_rows, geometry),
        inputs=INPUTS_LAST,
        bias_grads=tuple(user for user in node.users if user.args[1:] == (2,)),
    )


@op_rule(
    aten.embedding_dense_backward.default,
    examples=(lambda: (nn.Embedding(6, 3, padding_idx=1), (torch.randint(0, 6, (4, 5)),)),),
)
def embedding(node: fx.Node) -> Tap | Decline:
    """``a_NV``: one-hots (never made: their sum is a histogram); ``g_ND``. Rows of ``padding_idx`` leave both."""
    grad, indices, size, padding_idx, by_frequency = node.args
    if by_frequency:
        return Decline("scale_grad_by_freq makes the gradient differ from a product")
    value = fake_value(grad)
    return Tap(
        node,
        "embedding",
        (size, value.shape[-1]),
        rows_first=Operand(indices, one_hot_rows, (size, padding_idx, value.dtype)),
        rows_last=Operand(grad, looked_up, (indices, padding_idx)) if padding_idx >= 0 else Operand(grad, flat_rows),
        inputs=INPUTS_FIRST,
        count=Operand(indices, not_padding, (padding_idx,)) if padding_idx >= 0 else None,
    )
