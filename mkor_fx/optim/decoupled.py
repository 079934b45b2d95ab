"""What optimizers of one form share: a step along a direction, beside a decay of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..prims import accumulation_dtype
from .wide_state import WideState


class DecoupledOptimizer(WideState):
    """``p <- p (1 - lr weight_decay) - lr u``, with ``u`` a direction made of one tensor's gradient and state.

    A subclass makes the state (``fresh_state``) and the direction (``direction``). Both work in float32, in float64 for
    float64 parameters; half-precision ones keep such state, across ``load_state_dict`` as well. A step waits for nothing and
    compiles into one program.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, weight_decay: float, **options: Any) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay, **options}.items():
            if name in ("lr", "weight_decay", "eps") and not value >= 0:
                raise ValueError(f"{type(self).__name__}({name}={value!r}): must not be negative")
            if name == "betas" and not all(0 <= beta < 1 for beta in value):
                raise ValueError(
                    f"{type(self).__name__}(betas={value!r}): weights of old averages must lie in [0, 1), e.g. (0.9, 0.999)"
                )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    def fresh_state(self, group: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is kept for ``p`` beside the count of steps."""
        raise NotImplementedError

    def direction(self, group: dict[str, Any], grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``u``, shaped as the gradient, and the state written in place; ``state["step"]`` counts from 1, 0-dim."""
        raise NotImplementedError

    def _init_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse or p.is_complex():
                sparse = "sparse gradients: use torch.optim.SparseAdam for that parameter"
                kind = "complex parameters" if p.is_complex() else sparse
                raise RuntimeError(f"{type(self).__name__} takes no {kind}")
            if not self.state[p]:
                dtype = accumulation_dtype(p.dtype)
                count = torch.zeros((), dtype=dtype, device=p.device)
                self.state[p] = {"step": count, **self.fresh_state(group, p, dtype)}
            params.append(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the loss of ``closure``, which is called first if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            self._init_group(group, params)
            for p in params:
                assert p.grad is not None
                state = self.state[p]
                state["step"] += 1
                wide = state["step"].dtype
                along = self.direction(group, p.grad.to(wide), state)
                p.copy_(p.to(wide) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * along)
        return loss
