"""Adalayer: Adam with one second moment a block of a layer (Zhao et al., 2024, arXiv 2407.07972)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .decoupled import DecoupledOptimizer


class Adalayer(DecoupledOptimizer):
    """Adam whose second moment is a scalar a block, as in the authors' code (``AdalayerW``).

    With ``t`` the count of steps from 1 and the mean over the block that an element lies in:

        ``m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) mean(g^2)``
        ``p <- p (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``

    A block is a whole tensor. The authors find that some layers need more: the output layer and the embedding a block a row
    (``blocks="rows"``), attention weights that hold query, key and value one for each (``blocks=3``); give them groups of
    their own. Their variants that freeze ``v`` are left out.

    Args:
        params: parameters, or groups of them; every option below can differ from group to group.
        lr: learning rate.
        betas: weights of the old averages of gradients and of their mean squares, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, >= 0.
        blocks: into how many equal parts of its first axis a tensor is divided, or ``"rows"``: each row is one.

    Raises:
        ValueError: for an option outside its range, naming it, and for blocks that do not divide a tensor.
        RuntimeError: from ``step``, for a sparse gradient or complex parameters.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-15,
        weight_decay: float = 0.0, *, blocks: int | str = 1,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps, blocks=blocks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the group's blocks have to divide its tensors."""
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                _blocks(self.param_groups[-1]["blocks"], p)
        except ValueError:
            del self.param_groups[-1]
            raise

    def fresh_state(self, group: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        average = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return {"exp_avg": average, "mean_square": torch.zeros(_blocks(group["blocks"], p), dtype=dtype, device=p.device)}

    def direction(self, group: dict[str, Any], grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        (beta1, beta2), count = group["betas"], state["step"]
        average, square = state["exp_avg"], state["mean_square"]
        average.mul_(beta1).add_(grad * (1 - beta1))
        square.mul_(beta2).add_(grad.reshape(len(square), -1).square().mean(1) * (1 - beta2))
        root = (square / (1 - beta2**count)).sqrt() + group["eps"]
        mean = average / (1 - beta1**count)
        return (mean.reshape(len(square), -1) / root[:, None]).reshape(grad.shape)


def _blocks(chosen: int | str, p: Tensor) -> int:
    """How many blocks a tensor has."""
    rows = p.shape[0] if p.dim() else 1
    if chosen == "rows":
        return rows
    if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 1 or rows % chosen:
        raise ValueError(
            f"Adalayer(blocks={chosen!r}): must be 'rows' or a number that divides the first axis of each tensor, which for "
            f"{list(p.shape)} is {rows}"
        )
    return chosen
