"""Functions of torch that read one of their numbers on the host, in forms that take a tensor there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Refused(Exception):
    """What stands in the way of a trace, in words for the user."""


def without_host(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Call a function of torch; in another way where it would read a number that is a tensor on the host."""
    for scale in ("alpha", "value"):
        if isinstance(kwargs.get(scale), Tensor):
            return _scaled(name, args, kwargs.pop(scale))
    if name == "square_":  # torch has no functional form of it
        return args[0].mul_(args[0])
    if name in ("clamp", "clamp_", "clip", "clip_"):  # with one bound a tensor, the other a number
        bounds = dict(zip(("min", "max"), args[1:])) | kwargs
        clamped = args[0]
        for bound in ("min", "max"):
            if (limit := bounds.pop(bound, None)) is not None:
                clamped = getattr(clamped, f"clamp_{bound}{'_' * name.endswith('_')}")(limit)
        return func(*args, **kwargs) if bounds else clamped
    if name in ("tensor", "as_tensor") and isinstance(args[0], Tensor):
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return args[0].detach().to(kwargs.get("device") or args[0].device, dtype, copy=True)
    return func(*args, **kwargs)


def _scaled(name: str, args: tuple, scale: Tensor) -> Tensor:
    """``x.add(y, alpha=s)``, ``x.addcmul(y, z, value=s)`` and kin for a tensor ``s``."""
    kind = name.removesuffix("_")
    target, operands = args[0], args[1:]
    terms = {
        "add": lambda y: y * scale,
        "sub": lambda y: -(y * scale),
        "addcmul": lambda y, z: y * scale * z,
        "addcdiv": lambda y, z: y * scale / z,
    }
    if kind not in terms:
        raise Refused(f"torch.{name} takes its factor on the host")
    return target.add_(terms[kind](*operands)) if name.endswith("_") else target.add(terms[kind](*operands))
