"""HyLo: a Fisher matrix of few rows, inverted exactly (Mu, Soori, Can, Gurbuzbalaban and Mehri Dehnavi, SC 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kinds import Kind
from ..prims import accumulation_dtype, uniforms
from .base import Rule, Shape, State, Use
from .direction import Gradient, Graft
from .hyper import Hyper, check_count, check_kl_clip, check_positive


@dataclass(frozen=True, kw_only=True)
class HyLo(Rule):
    """Natural gradient of the empirical Fisher matrix, from a few of a batch's rows.

    With rows ``a`` of inputs (and a 1 for the bias), ``g`` of output gradients (which carry ``1/N``), ``u = N g (x) a`` and
    ``F`` the mean of ``u u^T``, the direction is ``(F + damping)^-1 G`` by the Woodbury identity. ``S`` are ``rows`` of each
    rank and micro-batch, ``n`` is how many rows they stand for, and ``Z_st = <u_s, u_t> / n`` their kernel:

        ``D = (G - sum_S y_s u_s / n) / damping``, ``y = B (B^T Z B + damping + e)^-1 B^T z``, ``z_s = <u_s, G>``

    - ``"kis"``: ``S`` is sampled without replacement, by ``|a|^2 |g|^2`` and without importance weights, as published.
      ``B`` is the identity and ``e`` zero.
    - ``"kid"``: ``S`` are the rows of largest ``|a|^2 |g|^2``, and the others their interpolations ``U ~ U_S T`` by least
      squares: ``B B^T = T T^T``, and ``e`` is the mean over all rows of the squared distance that is left, over ``n``. The
      published code interpolates the columns of the ``N x N`` kernel and keeps all of that remainder; here no such matrix is
      made, and statistics stay homogeneous in the scale of the loss. What lies below 1e-6 of the kernel's trace is lost.

    Either is exact where ``S`` is all rows, and otherwise ``<D, G> > 0``. Positions of a sequence or an image are rows.
    What is gathered is laid out so that sums do it: a rank and micro-batch writes its rows into a slot of its own and zeros
    elsewhere. More ranks than ``ranks``, and more micro-batches of a step than ``micro_batches``, are refused. A weight
    that one program reads in two ways (a convolution that is applied twice) and an embedding are left to the base optimizer.
    A table that is also an output layer takes its rows from the latter.

    With ``K = ranks micro_batches rows``, state are ``K (O + I) + K^2`` numbers a layer, ``K (O + I)`` (``kid``: and
    ``K rows``) cross the network, a refresh costs ``2 K^2 (O + I) + 2 K^3`` flops and ``kid`` ``2 rows N (O + I + rows)`` a
    rank, a step ``4 K O I``.

    Args:
        damping: > 0. Published: from 1 down, as by a function of the step; a state keeps that of its refresh.
        method: see above; published: ``kid`` early on and behind changes of the rate, else ``kis``.
        rows: of each rank and micro-batch, 1 or more; published: a tenth of a batch.
        ranks: how many there may be, 1 or more.
        micro_batches: of a step, by ``accumulate`` or by calls in your own loop, 1 or more.
        graft: what sizes a direction.
        kl_clip: a bound on all steps together, with ``graft=None``, see :class:`KFAC`.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    damping: Hyper = 1.0
    method: Literal["kis", "kid"] = "kis"
    rows: int = 32
    ranks: int = 1
    micro_batches: int = 1
    graft: Graft | None = "gradient"
    kl_clip: Hyper | None = None

    draws = True
    joint_bias = True
    kinds = {"a": Kind.MOMENT, "g": Kind.MOMENT, "core": Kind.POSITIVE}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_positive(self, "damping", "1.0")
        for name in ("rows", "ranks", "micro_batches"):
            check_count(self, name)
        if self.method not in ("kis", "kid"):
            raise ValueError(f"HyLo(method={self.method!r}): must be 'kis' or 'kid'")
        check_kl_clip(self)

    @property
    def gathers(self) -> tuple[int, int]:  # type: ignore[override]
        return self.ranks, self.micro_batches

    def without_state(self, shape: Shape) -> str:
        return "it is an embedding, which HyLo leaves to the base optimizer"

    def init(self, shape: Shape, device: torch.device) -> State:
        """Scaled rows ``a`` ``[K, I]``, ``g`` ``[K, O]`` and the ``core`` ``B (B^T Z B + damping + e)^-1 B^T`` ``[K, K]``,
        zero, and its ``damping``. Float32, the core float64: sums over rows that are alike cancel."""
        if shape.lookup:
            return {}
        kept = self.ranks * self.micro_batches * self.rows
        sizes, dtypes = {"a": (kept, shape.I), "g": (kept, shape.O), "core": (kept, kept)}, {"core": torch.float64}
        zeros = {name: torch.zeros(size, dtype=dtypes.get(name), device=device) for name, size in sizes.items()}
        return {**zeros, "damping": torch.ones((), device=device)}

    # ---- statistics ---------------------------------------------------------------------------------------------------

    def summarize(  # type: ignore[override]
        self, shape: Shape, a_NI: Tensor, g_NO: Tensor, key: Tensor
    ) -> tuple[Tensor, ...]:
        """In the slot of ``key``: rows ``[slots, rows, I]``, ``[slots, rows, O]``, their ``B`` ``[slots, rows, rows]``, the
        sum of squared distances, how many rows they stand for, and a 1, ``[slots]`` each."""
        wide = accumulation_dtype(g_NO.dtype)
        a_NI, g_NO = a_NI.to(wide), g_NO.to(wide)
        squares_N = (a_NI.square().sum(-1) + shape.bias) * g_NO.square().sum(-1)
        score_N, count = squares_N, torch.ones_like(squares_N).sum()
        if self.method == "kis":  # the largest of p / E, E exponential: a sample without replacement by p
            score_N = squares_N / -uniforms(key, 0, squares_N.shape[0], wide).log()
            count = count.clamp_max(self.rows)
        none_N = [rows.new_zeros(self.rows, *rows.shape[1:]) for rows in (score_N, a_NI, g_NO)]  # where rows are fewer
        chosen = torch.cat([score_N, none_N[0] - 1]).topk(self.rows).indices
        a_S, g_S = torch.cat([a_NI, none_N[1]])[chosen], torch.cat([g_NO, none_N[2]])[chosen]
        B, distance = g_S.new_zeros(0), g_S.new_zeros(())
        if self.method == "kid":
            Z_SS, Z_SN = (kernel(a_S, g_S, *others, shape.bias) for others in ((a_S, g_S), (a_NI, g_NO)))
            root, noise = _root(Z_SS)
            Q_SN = torch.linalg.solve_triangular(root, Z_SN, upper=False)
            T = torch.linalg.solve_triangular(root.mT, Q_SN, upper=True)
            B = torch.linalg.solve_triangular(root.mT, _root(Q_SN @ Q_SN.mT)[0], upper=True)
            distance = (squares_N.sum() - Q_SN.square().sum() - noise * T.square().sum()).clamp_min(0)
        slot = ((key >> 16) & 0xFFFF) % self.micro_batches * self.ranks + (key & 0xFFFF)
        inside = (key & 0xFFFF) < self.ranks
        own = ((torch.arange(self.ranks * self.micro_batches, device=g_NO.device) == slot) & inside).to(wide)
        return tuple(own.view(-1, *[1] * t.dim()) * t for t in (a_S, g_S, B, distance, count, torch.ones_like(count)))

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        a, g, B, distance, count, written = summary
        return a, g / scale, B, distance / (scale * scale), count, written

    def update(self, state: State, uses: list[Use], grad: Gradient, step: Tensor) -> State:
        """Of slots that were written once; where there is none the state stays as it is."""
        own = [use for use in uses if not use.opposite]
        if not own:
            return state
        a, g, blocks, distance, count, written = (t.to(state["core"].dtype) for t in own[0].summary)
        once = (written == 1).to(a.dtype)
        n, N = (once * count).sum(), own[0].rows.to(a.dtype)
        a, g = (once[:, None, None] * a).flatten(0, 1), (once[:, None, None] * g).flatten(0, 1) * N / n.sqrt()
        damping, left = torch.ones_like(n) * self.damping, (once * distance).sum() * (N / n).square()
        Z, eye = kernel(a, g, a, g, grad.bias is not None), torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
        B = eye
        if self.method == "kid":  # a block of each slot
            slots = torch.eye(len(once), dtype=a.dtype, device=a.device) * once
            B = (slots[:, None, :, None] * blocks[:, :, None, :]).reshape(Z.shape)
        core = B @ torch.linalg.inv_ex(B.mT @ Z @ B + (damping + left) * eye).inverse @ B.mT
        new = {"a": a, "g": g, "core": (core + core.mT) / 2, "damping": damping}
        return {name: torch.where(n > 0, t.to(state[name].dtype), state[name]) for name, t in new.items()}

    # ---- directions ---------------------------------------------------------------------------------------------------

    def precondition(self, state: State, grad: Gradient) -> Gradient:
        dtype = accumulation_dtype(grad.weight.dtype)  # in float16 lengths overflow
        G, b = grad.to(dtype)
        a, g, damping = (state[name].to(dtype) for name in ("a", "g", "damping"))
        z = ((g @ G) * a).sum(-1)
        y = (state["core"] @ (z if b is None else z + g @ b).to(state["core"].dtype)).to(dtype)
        weight = (G - (y[:, None] * g).mT @ a) / damping
        return Gradient(weight, None if b is None else (b - y @ g) / damping).to(grad.weight.dtype)


def kernel(a_MI: Tensor, g_MO: Tensor, a_NI: Tensor, g_NO: Tensor, bias: bool) -> Tensor:
    """Inner products ``[M, N]`` of the matrices ``g (x) a`` that rows stand for, a 1 behind each ``a`` with a ``bias``."""
    return (a_MI @ a_NI.mT + bias) * (g_MO @ g_NO.mT)


def _root(matrix_SS: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of a positive semi-definite matrix, with what rounding leaves added, and that: rows may be
    alike."""
    limits = torch.finfo(matrix_SS.dtype)
    noise = 10 * limits.eps * matrix_SS.diagonal(dim1=-2, dim2=-1).sum(-1) + limits.tiny
    eye = torch.eye(matrix_SS.shape[-1], dtype=matrix_SS.dtype, device=matrix_SS.device)
    return torch.linalg.cholesky_ex(matrix_SS + noise * eye).L, noise
