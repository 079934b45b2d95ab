"""What MKOR's factors are updated with: means and random-sign sketches of the rows, sketches of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prims import accumulation_dtype, column_sum, rademacher, sketch
from .base import Shape, Use
from .inverse_updates import NOISE, rounding_of, unless_noise
from .moments import Moments


class MKORStatistics(Moments):
    """The part of :class:`MKOR` that makes and reads statistics."""

    def summarize(  # type: ignore[override]
        self, shape: Shape, a_NI: Tensor, g_NO: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """For ``"mean"`` the sums of ``a`` and ``g`` and how large either is by rounding alone, ``I + O + 2`` numbers; for
        ``"rows"`` their sketches, ``rank (I + O)``; nothing of a side that has no factor.

        Some sums are zero in exact arithmetic: of ``g`` in front of a batch norm or in an attention's keys, of ``a``
        behind centred data. Brought to full length they would be noise, so their size by rounding has to be known. Each
        entry is rounded by ``eps`` of its dtype, so a sum is noise below about ``eps * sqrt(sum_n |row|^2)``.
        """
        if self.clamp is not None:
            a_NI, g_NO = a_NI.clamp(-self.clamp, self.clamp), g_NO.clamp(-self.clamp, self.clamp)
        kept = (
            None if shape.lookup or shape.I > self.max_factor else a_NI,
            None if shape.O > self.max_factor else g_NO,
        )
        device, found = g_NO.device, list[Tensor]()
        if "mean" in self.statistics:
            found += [torch.zeros(0, device=device) if rows is None else column_sum(rows) for rows in kept]
        if "mean" in self.statistics and self.blind_to_scale:
            found += [torch.zeros((), device=device) if rows is None else rounding_of(rows) for rows in kept]
        if key is not None:
            for side, rows in enumerate(kept):
                if rows is None:
                    found.append(torch.zeros(0, device=device))
                else:
                    found.append(sketch(rows, key, side, self.rank))
        return tuple(found)

    def unscale(self, summary: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, ...]:
        """``g`` is linear in the scale, its rounding quadratic, the inputs do not depend on it."""
        one = torch.ones_like(scale)
        mean = (one, scale, one, scale * scale) if self.blind_to_scale else (one, scale)
        scales = (mean if "mean" in self.statistics else ()) + ((one, scale) if self.draws else ())
        return tuple(s / factor for s, factor in zip(summary, scales))

    def statistics_of(self, use: Use) -> list[tuple[Tensor, Tensor]]:
        """Pairs ``[1 or rank, I]``, ``[1 or rank, O]`` of a use; a side without a factor is empty."""
        found, summary = [], list(use.summary)
        if "mean" in self.statistics:
            a_sum, g_O = summary[:2]
            if self.blind_to_scale:
                a_sum, g_O = unless_noise(a_sum, summary[2]), unless_noise(g_O, summary[3])
            found.append(((a_sum / use.rows.clamp_min(1)).unsqueeze(0), g_O.unsqueeze(0)))
        if self.draws:
            found.append((summary[-2], summary[-1]))
        return found

    def gradient_sketches(self, raw_OI: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """``[rank, O]``, ``[rank, I]``"""
        dtype = accumulation_dtype(self.factor_dtype)
        grad_OI = raw_OI.to(dtype)
        if self.form == "damped":
            return sketch(grad_OI.mT, step, 2, self.rank), sketch(grad_OI, step, 3, self.rank)
        signs_I = rademacher(step, 0, grad_OI.shape[1], dtype)
        signs_O = rademacher(step, 1, grad_OI.shape[0], dtype)
        sketches = (grad_OI * signs_I).sum(1), (grad_OI * signs_O[:, None]).sum(0)
        if self.blind_to_scale:
            noise = (grad_OI * grad_OI).sum() * (NOISE * torch.finfo(raw_OI.dtype).eps) ** 2
            sketches = unless_noise(sketches[0], noise), unless_noise(sketches[1], noise)
        return sketches[0].unsqueeze(0), sketches[1].unsqueeze(0)
