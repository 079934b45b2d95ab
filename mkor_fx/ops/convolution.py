"""Convolutions and transposed convolutions in one, two and three dimensions, with groups."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..ir import INPUTS_FIRST, INPUTS_LAST, Decline, Operand, Tap, fake_value, product
from .rows import positions, unfold_rows
from .table import op_rule

aten = torch.ops.aten


@op_rule(
    aten.convolution_backward.default,
    output=1,
    covers="`nn.Conv1d`, `2d`, `3d`, `nn.ConvTranspose1d`, `2d`, `3d`: any stride, padding, dilation; a factor pair a group",
    examples=(
        lambda: (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (torch.randn(2, 2, 7, 8),)),
        lambda: (nn.Conv2d(2, 3, 1, bias=False), (torch.randn(2, 2, 4, 4),)),
        lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (torch.randn(2, 4, 9),)),
        lambda: (nn.Conv2d(4, 8, 3, padding="same", groups=4), (torch.randn(2, 4, 5, 6),)),
        lambda: (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (torch.randn(2, 2, 3, 4, 5),)),
        lambda: (nn.ConvTranspose1d(3, 2, 4, stride=3, dilation=2, output_padding=1), (torch.randn(2, 3, 5),)),
        lambda: (nn.ConvTranspose1d(3, 2, 2, stride=2, dilation=4, output_padding=3), (torch.randn(2, 3, 5),)),
        lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (torch.randn(2, 4, 5, 4),)),
    ),
)
def convolution(node: fx.Node) -> Tap | Decline:
    """``[O, C, *kernel]``: ``a_NI`` are unfolded patches, ``N`` output positions, ``I = C prod(kernel)``; ``g_NO`` the
    gradients of the outputs. Transposed, ``[C, O, *kernel]``: ``a_NI`` are the inputs at ``N`` positions, ``I = C``; the
    ``O prod(kernel)`` outputs are patches of the output's gradient. With groups the matrices are ``[E, ...]``.
    """
    grad, images, weight, _, stride, padding, dilation, transposed, output_padding, groups, _ = node.args
    first, *rest = fake_value(weight).shape
    spatial = len(rest) - 1
    stride, padding, dilation, output_padding = (
        tuple(x) * (spatial if len(x) == 1 else 1) for x in (stride, padding, dilation, output_padding)
    )
    seen, at = (grad, images) if transposed else (images, grad)
    surplus = tuple(o // s if transposed else 0 for o, s in zip(output_padding, stride))
    geometry = (tuple(rest[1:]), stride, padding, dilation, surplus, groups)
    return Tap(
        node,
        f"conv_transpose{spatial}d" if transposed else f"conv{spatial}d",
        (*((groups,) if groups > 1 else ()), first // groups, product(rest)),
        rows_first=Operand(at, positions, (groups,)),
        rows_last=Operand(seen, unfold_rows, geometry),
        inputs=INPUTS_FIRST if transposed else INPUTS_LAST,
        bias_grads=frozenset(() if transposed else (user for user in node.users if user.args[1:] == (2,))),
    )
