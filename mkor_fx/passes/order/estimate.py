"""How long a node would take on a GPU that is not there. Everything here is an estimate, held against no machine.

Compute is a roofline over the numbers in ``DEVICES``; collectives are Inductor's model of NCCL's own tuning (NVLink inside
nodes of eight, InfiniBand between them). Neither knows of launch cost, ranks that are late, or kernels and collectives that
compete for a device's processors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from ...ir import fake_value
from ..torch_api.nccl_model import nccl_milliseconds
from .collectives import c10d

#: share of the peak that a product reaches, as Inductor's own roofline assumes
EFFICIENCY = 0.75

aten = torch.ops.aten


@dataclass(frozen=True)
class Device:
    """Peaks from the vendor's data sheet, dense: Tflop/s by dtype ("tf32" where float32 products may use it), GB/s.

    ``generation`` picks bandwidths and latencies of NVLink and InfiniBand in Inductor's model.
    """

    name: str
    tflops: dict[torch.dtype | str, float]
    memory: float
    generation: str
    source: str

    def peak(self, dtype: torch.dtype) -> float:
        """flop/s of products in ``dtype``."""
        fast = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return 1e12 * self.tflops.get("tf32" if fast else dtype, self.tflops[torch.float32])


_AMPERE = {torch.float64: 19.5, torch.float32: 19.5, "tf32": 156.0, torch.bfloat16: 312.0, torch.float16: 312.0}
_HOPPER = {torch.float64: 67.0, torch.float32: 67.0, "tf32": 494.5, torch.bfloat16: 989.5, torch.float16: 989.5}
DEVICES = {
    "a100": Device("A100 80GB SXM", _AMPERE, 2039, "AMPERE", "NVIDIA A100 Tensor Core GPU data sheet"),
    "h100": Device("H100 SXM", _HOPPER, 3350, "HOPPER", "NVIDIA H100 Tensor Core GPU data sheet, without sparsity"),
    "h200": Device("H200 SXM", _HOPPER, 4800, "HOPPER", "NVIDIA H200 Tensor Core GPU data sheet, without sparsity"),
}

#: what Inductor's model knows; a broadcast passes as many bytes over each link as an all-gather, in as many steps
_KINDS = {
    c10d.all_reduce.default: "ALL_REDUCE",
    c10d.broadcast.default: "ALL_GATHER",
    c10d.reduce_scatter_tensor.default: "REDUCE_SCATTER",
    c10d.all_gather_into_tensor.default: "ALL_GATHER",
}


def collective_milliseconds(start: fx.Node, ranks: int, device: Device) -> float:
    """One collective among ``ranks``, alone on the network. Bytes of the larger of what is sent and what arrives."""
    size = max(tensor_bytes(start.args[0]), tensor_bytes(start))
    return nccl_milliseconds(_KINDS[start.target], size, ranks, device.generation)


def product_milliseconds(node: fx.Node, device: Device) -> float:
    """A product, convolution or attention: its flops or its operands' bytes, whichever takes longer."""
    moved = sum(map(tensor_bytes, {*node.all_input_nodes, node}))
    dtype = next(leaf.dtype for leaf in pytree.tree_leaves(fake_value(node)) if isinstance(leaf, Tensor))
    return max(1e3 * flops_of(node) / (EFFICIENCY * device.peak(dtype)), transfer_milliseconds(moved, device))


def flops_of(node: fx.Node) -> int:
    """Of a product, a convolution or an attention; 0 of anything else."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), fake_value)
    return formula(*args, **kwargs, out_val=fake_value(node))


def transfer_milliseconds(size: float, device: Device) -> float:
    """``size`` bytes to or from the device's memory."""
    return size / (device.memory * 1e6)


def fused_bytes(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """What each node of a run of cheap ones moves if the run is one kernel: what it reads from outside, what is read there.

    An operand counts at its first reader. A copy back into an input is free: the kernel that makes the value writes there.
    """
    run = list(nodes)
    inside, seen = set(run), set[fx.Node]()
    moved = dict.fromkeys(run, 0)
    for node in run:
        if is_free(node):
            continue
        operands = {arg for arg in node.all_input_nodes if _viewed(arg) not in inside} - seen
        seen |= operands
        moved[node] = sum(map(tensor_bytes, operands))
        if any(reader not in inside for reader in _readers(node)):
            moved[node] += tensor_bytes(node)
    return moved


def is_free(node: fx.Node) -> bool:
    """No kernel: a view, a part of a tuple, a write to where a value is made, or no operation at all."""
    return node.op != "call_function" or node.target is aten.copy_.default or _is_view(node)


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) or getattr(node.target, "__name__", "") == "getitem"


def _viewed(node: fx.Node) -> fx.Node:
    while _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads the node's memory, through views."""
    for user in node.users:
        yield from _readers(user) if _is_view(user) else [user]


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of a node's tensors; an expanded dimension is one element."""
    return sum(_bytes(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride or size == 0 else 1
    return count * tensor.element_size()
