"""COAP: Adam of a matrix's projection on few directions, which follow the gradient (Xiao et al., 2024, arXiv 2412.00071)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .decoupled import DecoupledOptimizer

#: rate of the projection's own steps, largest norm of their gradient, and norm below which a row has no direction
RATE, LONGEST, SHORTEST = 0.1, 1.0, 1e-8
SEED = 3407


class COAP(DecoupledOptimizer):
    """Correlation-aware gradient projection, as in the authors' code for matrices.

    A tensor is a matrix ``G`` of ``m`` rows, its first axis, and ``n`` columns; one with ``m < n`` is transposed. ``P`` is
    ``r x n``, ``r = max(1, n // ratio)``, at first random with orthonormal rows. With ``t`` the count of steps from 1, ``P``
    is made anew where ``t - 1`` is a multiple of ``every * sketch_every``, as in the first step:

        ``Q = qr(G P^T),   P <- V^T,  with  U S V^T = Q^T G``

    Where it is another multiple of ``every``, ``P`` takes one step. Cosines are those of rows, of columns where ``G`` was
    transposed:

        ``L(P) = mean((G P^T P - G)^2) (1 - mean_i cos((M P)_i, G_i)),   D = dL / dP``
        ``P <- P - 0.1 D / max(1, |D|)``

    And in each step

        ``g = G P^T,   M <- b1 M + (1 - b1) g,   V <- b2 V + (1 - b2) g^2``
        ``U = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps),   p <- p (1 - lr weight_decay) - lr scale U P``

    ``M`` and ``V`` stay as they are where ``P`` changes. With ``P`` the identity, and for vectors, this is AdamW. Unlike in
    the authors' code, ``eps`` and weight decay are as in ``torch.optim.AdamW``, convolutions are matrices as well (there
    they are projected along two axes), and steps are counted for a group, as its ``"turn"``. A compiled step has a program
    for each of the three kinds of steps, and reads the count to choose one, for which it waits for the step before.

    Args:
        params: parameters, or groups of them; every option below can differ from group to group.
        lr: learning rate.
        betas: weights of the old averages of gradients and of their squares, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, >= 0.
        ratio: of a matrix's shorter side to the rank of its projection, >= 1.
        every: steps from one change of the projections to the next, 1 or more.
        sketch_every: of how many changes one makes a projection anew, 1 or more.
        scale: factor of the steps of matrices, > 0.

    Raises:
        ValueError: for an option outside its range, naming it.
        RuntimeError: from ``step``, for a sparse gradient or complex parameters.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.0, *, ratio: float = 2.0, every: int = 32, sketch_every: int = 5,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        if not ratio >= 1:
            raise ValueError(f"COAP(ratio={ratio!r}): of a matrix's shorter side to the projection's, 1 or more, e.g. 2")
        for name, count in (("every", every), ("sketch_every", sketch_every)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"COAP({name}={count!r}): must be an integer, 1 or more")
        if not scale > 0:
            raise ValueError(f"COAP(scale={scale!r}): must be positive")
        own = {"every": every, "sketch_every": sketch_every, "scale": scale, "turn": 0}
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps, ratio=ratio, **own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the loss of ``closure``, which is called first if there is one."""
        loss = super().step(closure)
        for group in self.param_groups:
            group["turn"] += 1
        return loss

    def fresh_state(self, group: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        zeros = lambda *sizes: torch.zeros(sizes, dtype=dtype, device=p.device)
        if p.dim() < 2:
            return {"exp_avg": zeros(*p.shape), "exp_avg_sq": zeros(*p.shape)}
        short, long = sorted((p.shape[0], p[0].numel()))
        rank = max(1, int(short // group["ratio"]))
        drawn = torch.randn(short, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
        basis = torch.linalg.qr(drawn)[0].T.to(p.device, dtype)
        return {"projection": basis, "exp_avg": zeros(long, rank), "exp_avg_sq": zeros(long, rank)}

    def direction(self, group: dict[str, Any], grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        if grad.dim() < 2:
            return _adam(group, grad, state)
        matrix = grad.flatten(1)
        wide = matrix.shape[0] < matrix.shape[1]
        tall, basis = matrix.T if wide else matrix, state["projection"]
        if group["turn"] % (group["every"] * group["sketch_every"]) == 0:
            basis.copy_(sketch(tall, basis))
        elif group["turn"] % group["every"] == 0:
            along = slope(tall, basis, state["exp_avg"], columns=wide)
            basis.sub_(RATE * along / (torch.linalg.vector_norm(along) / LONGEST).clamp(min=1))
        update = group["scale"] * (_adam(group, tall @ basis.T, state) @ basis)
        return (update.T if wide else update).reshape(grad.shape)


def _adam(group: dict[str, Any], grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    (beta1, beta2), count = group["betas"], state["step"]
    average, square = state["exp_avg"], state["exp_avg_sq"]
    average.mul_(beta1).add_(grad * (1 - beta1))
    square.mul_(beta2).add_(grad.square() * (1 - beta2))
    return (average / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + group["eps"])


def sketch(matrix: Tensor, basis: Tensor) -> Tensor:
    """Right singular vectors ``[r, n]`` of what ``matrix`` ``[m, n]`` is in the range of its product with ``basis``."""
    orthonormal = torch.linalg.qr(matrix @ basis.T)[0]
    return torch.linalg.svd(orthonormal.T @ matrix, full_matrices=False)[2]


def slope(matrix: Tensor, basis: Tensor, average: Tensor, columns: bool) -> Tensor:
    """``dL/dP`` in closed form, of ``matrix`` ``[m, n]`` and ``average`` ``[m, r]``, with cosines of ``columns``."""
    rest = matrix @ basis.T @ basis - matrix
    both = matrix.T @ rest
    kept, axis = average @ basis, 0 if columns else 1
    lengths = [torch.linalg.vector_norm(t, dim=axis, keepdim=True).clamp(min=SHORTEST) for t in (kept, matrix)]
    cosines = (kept * matrix).sum(axis, keepdim=True) / (lengths[0] * lengths[1])
    turned = (matrix / (lengths[0] * lengths[1]) - cosines * kept / lengths[0].square()) / cosines.numel()
    apart = 2 / matrix.numel() * (basis @ (both + both.T))
    return (1 - cosines.mean()) * apart - rest.square().mean() * (average.T @ turned)
