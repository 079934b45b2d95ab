"""What a gradient scaler has done to the gradients, found where torch keeps it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.amp import grad_scaler
from torch.optim import Optimizer


def loss_scales(optimizer: Optimizer, device: torch.device) -> tuple[Tensor, Tensor] | tuple[()]:
    """``(in the statistics, in .grad)``, 0-dim each; NaN where the scaler has found an inf; empty without a scaler.

    Inside a fused optimizer's step the scaler has left its scale and verdict on the optimizer, and ``.grad`` is still
    scaled, unless the user has had it unscaled, to clip it: then no scale is left. Any other optimizer is stepped with
    unscaled gradients and only when they are finite. The statistics were taken in the backward, under the scale.
    """
    scaler = _stepping_scaler()
    one = torch.ones((), device=device)
    held, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scaler is None and found_inf is None:
        return ()
    in_gradient = one if held is None else held.to(device).reshape(())
    in_statistics = in_gradient if scaler is None else scaler._get_scale_async().to(device).reshape(())
    if found_inf is None:
        return in_statistics, in_gradient
    found = found_inf.to(device).reshape(()) > 0
    nan = torch.full_like(one, float("nan"))
    return torch.where(found, nan, in_statistics), torch.where(found, nan, in_gradient)


def _stepping_scaler() -> Any:
    """The ``GradScaler`` in whose ``step`` we are being called, or None. It tells optimizers that are not fused nothing."""
    frame = sys._getframe(1)
    for _ in range(24):
        if frame is None:
            return None
        if frame.f_code is grad_scaler.GradScaler.step.__code__:
            scaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
        frame = frame.f_back  # type: ignore[assignment]
    return None
