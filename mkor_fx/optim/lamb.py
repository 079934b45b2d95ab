"""LAMB: Adam's direction at the size of the weight (You et al., 2019, arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..prims import accumulation_dtype
from .wide_state import WideState


class LAMB(WideState):
    """Layer-wise adaptive moments, in the convention of NVIDIA's apex (``FusedLAMB``); :meth:`deepspeed` has DeepSpeed's.

    With ``t`` the count of steps from 1 and ``|.|`` the Euclidean norm of one tensor:

        ``g <- g / max(1, |all g| / max_grad_norm)``
        ``m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2``
        ``u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p``
        ``p <- p - lr r u,   r = |p| / |u|``, clipped to ``trust``; 1 where either norm is zero

    ``|all g|`` is over every gradient of every group. ``r`` is 1 for groups without weight decay (biases and norms belong in
    one such), unless ``adapt_all``. What is preconditioned in front of it (``mkor_fx.compile``) is measured as it arrives.

    Moments are in float32, in float64 for float64 parameters. The step waits for nothing and compiles into one program.

    Args:
        params: parameters, or groups of them; every option below can differ from group to group.
        lr: learning rate; ``r`` makes it the share of its norm by which a weight moves.
        betas: weights of the old averages of gradients and of their squares, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: part of the update that ``r`` measures, >= 0.
        max_grad_norm: norm of all gradients above which they are scaled down, None: never.
        bias_correction: whether averages are divided by ``1 - b^t``; the paper's last version does without.
        adapt_all: whether ``r`` serves groups without weight decay as well.
        trust: bounds of ``r``, None: none.

    Raises:
        ValueError: for an option outside its range, naming it.
        RuntimeError: from ``step``, for a sparse gradient.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.01, *, max_grad_norm: float | None = 1.0, bias_correction: bool = True,
        adapt_all: bool = False, trust: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        limits = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        for name, value in limits.items():
            if not value >= 0:
                raise ValueError(f"LAMB({name}={value!r}): must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LAMB(betas={betas!r}): weights of old averages must lie in [0, 1), e.g. (0.9, 0.999)")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"LAMB(max_grad_norm={max_grad_norm!r}): must be positive; None does not scale gradients down")
        if trust is not None and not (isinstance(trust, tuple) and len(trust) == 2 and 0 <= trust[0] <= trust[1]):
            raise ValueError(f"LAMB(trust={trust!r}): bounds of a ratio of norms, e.g. (0.01, 10.0)")
        options = {"max_grad_norm": max_grad_norm, "bias_correction": bias_correction, "adapt_all": adapt_all}
        super().__init__(params, {**limits, "betas": betas, **options, "trust": trust})

    @classmethod
    def deepspeed(
        cls, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, **options: Any,
    ) -> LAMB:  # fmt: skip
        """As DeepSpeed's ``FusedLamb``: ``r`` serves every tensor and lies in [0.01, 10]; gradients are not scaled down."""
        options = {"max_grad_norm": None, "adapt_all": True, "trust": (0.01, 10.0), **options}
        return cls(params, lr, betas, eps, weight_decay, **options)

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], averages: list[Tensor],
        squares: list[Tensor], steps: list[Tensor],
    ) -> None:  # fmt: skip
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("LAMB takes no sparse gradients: use torch.optim.SparseAdam for that parameter")
            state = self.state[p]
            if not state:
                dtype = accumulation_dtype(p.dtype)
                state["step"] = torch.zeros((), dtype=dtype, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(p.grad.to(state["exp_avg"].dtype))
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the loss of ``closure``, which is called first if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = []
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *lists)
            gathered.append((group, lists))
        norms = [torch.linalg.vector_norm(grad) for _, lists in gathered for grad in lists[1]]
        if not norms:
            return loss
        whole = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
        for group, lists in gathered:
            for p, grad, average, square, count in zip(*lists, strict=True):
                limit = group["max_grad_norm"]
                if limit is not None:
                    grad = grad / (whole.to(grad) / limit).clamp(min=1)
                self._update(group, p, grad, average, square, count)
        return loss

    @staticmethod
    def _update(
        group: dict[str, Any], p: Tensor, grad: Tensor, average: Tensor, square: Tensor, count: Tensor
    ) -> None:
        beta1, beta2 = group["betas"]
        count += 1
        average.mul_(beta1).add_(grad * (1 - beta1))
        square.mul_(beta2).add_(grad * grad * (1 - beta2))
        mean, root = average, square
        if group["bias_correction"]:
            mean, root = average / (1 - beta1**count), square / (1 - beta2**count)
        update = mean / (root.sqrt() + group["eps"])
        wide = p.to(update.dtype)
        if group["weight_decay"] != 0:
            update = update + group["weight_decay"] * wide
        if group["adapt_all"] or group["weight_decay"] != 0:
            own, made = torch.linalg.vector_norm(wide), torch.linalg.vector_norm(update)
            ratio = own / torch.where(made > 0, made, torch.ones_like(made))
            if group["trust"] is not None:
                ratio = ratio.clamp(*group["trust"])
            update = update * torch.where((own > 0) & (made > 0), ratio, torch.ones_like(ratio))
        p.copy_(wide - group["lr"] * update)
