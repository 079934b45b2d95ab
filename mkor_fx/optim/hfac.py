"""H-Fac: momentum and second moment from row and column means (Nguyen et al., 2024, arXiv 2406.09958)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .decoupled import DecoupledOptimizer


class HFac(DecoupledOptimizer):
    """Factorized Hamiltonian descent; written from its published equations, no code of the authors' being known to us.

    A tensor is a matrix ``G`` of ``m`` rows, its first axis, and ``n`` columns. With ``t`` the count of steps from 1 and
    ``c_i = b_i (1 - b_i^(t-1)) / (1 - b_i^t)``, which makes plain averages of the first gradients:

        ``u <- c1 u + (1 - c1) G 1/n,   v <- c1 v + (1 - c1) G^T 1/m``
        ``r <- c2 r + (1 - c2) (G^2 + eps) 1,   s <- c2 s + (1 - c2) (G^2 + eps)^T 1``
        ``U = G / sqrt(r s^T / sum(r)),   clip(U) = U / max(1, RMS(U) / threshold)``
        ``D = c1 / 2 ((u - G 1/n) / sqrt(r / n) 1^T + 1 (v - G^T 1/m)^T / sqrt(s / m)) + clip(U)``
        ``p <- p - lr (D + weight_decay p)``

    For vectors, of which the paper does not speak, ``D`` is Adam's: both averages are element by element.

    Args:
        params: parameters, or groups of them; every option below can differ from group to group.
        lr: learning rate.
        betas: weights of the old averages of gradients and of their squares, each in [0, 1).
        eps: added to squares, >= 0.
        weight_decay: decoupled, >= 0.
        threshold: root mean square above which ``U`` is scaled down, > 0.

    Raises:
        ValueError: for an option outside its range, naming it.
        RuntimeError: from ``step``, for a sparse gradient or complex parameters.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-30, weight_decay: float = 0.0, *, threshold: float = 1.0,
    ) -> None:  # fmt: skip
        if not threshold > 0:
            raise ValueError(f"HFac(threshold={threshold!r}): a root mean square above 0, e.g. 1.0")
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps, threshold=threshold)

    def fresh_state(self, group: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        zeros = lambda *sizes: torch.zeros(sizes, dtype=dtype, device=p.device)
        if p.dim() < 2:
            return {"exp_avg": zeros(*p.shape), "exp_avg_sq": zeros(*p.shape)}
        rows, columns = p.shape[0], p[0].numel()
        sides = {"row": rows, "column": columns}
        return {f"{side}_{kind}": zeros(size) for side, size in sides.items() for kind in ("mean", "square")}

    def direction(self, group: dict[str, Any], grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        weights = [beta * (1 - beta ** (state["step"] - 1)) / (1 - beta ** state["step"]) for beta in group["betas"]]
        old, squares = weights[0], grad.square() + group["eps"]
        if grad.dim() < 2:
            _average(state["exp_avg"], grad, old)
            _average(state["exp_avg_sq"], squares, weights[1])
            return state["exp_avg"] / state["exp_avg_sq"].sqrt()
        matrix, squares = grad.flatten(1), squares.flatten(1)
        sides = {"row": 1, "column": 0}
        for side, other in sides.items():
            _average(state[f"{side}_mean"], matrix.mean(other), old)
            _average(state[f"{side}_square"], squares.sum(other), weights[1])
        rows, columns = state["row_square"], state["column_square"]
        update = matrix / torch.outer((rows / rows.sum()).sqrt(), columns.sqrt())
        update = update / (update.square().mean().sqrt() / group["threshold"]).clamp(min=1)
        for side, other in sides.items():
            root = (state[f"{side}_square"] / matrix.shape[other]).sqrt()
            update = update + ((old / 2) * (state[f"{side}_mean"] - matrix.mean(other)) / root).unsqueeze(other)
        return update.reshape(grad.shape)


def _average(kept: Tensor, new: Tensor, weight: Tensor) -> None:
    kept.copy_(weight * kept + (1 - weight) * new)
