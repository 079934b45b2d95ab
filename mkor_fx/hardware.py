"""What devices have instructions for."""

from __future__ import annotations

import functools

import torch

#: of a processor with instructions for products in a dtype, as ``torch.cpu.get_capabilities`` names them
_PROCESSORS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}
#: the first compute capability of a GPU with them
_GPUS = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}


@functools.cache
def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has instructions for products in a half-precision ``dtype``: others are many times slower with it
    than with float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _GPUS[dtype]
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(known.get(name) for name in _PROCESSORS[dtype])
