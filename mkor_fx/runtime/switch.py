"""When a run leaves its rule for the base optimizer, and when it comes back: by the losses of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: windows of a trial: one passed over, two that count
TRIAL = 3
#: the patience doubles no further
LONGEST = 64.0


class Trend(NamedTuple):
    """All that decisions depend on, as numbers. NaN: not known yet.

    ``first_order``: 1 without the rule. ``trial``: windows that are left of one. ``mean``: loss of the last window; ``gain``
    and ``best`` since the last trial; ``low``: windows below the threshold, of ``wait``; ``before``: gain in front of the
    trial, ``half``: that of its first window that counts. ``cost`` of a step without the rule, over one with it.
    """

    first_order: float = 0.0
    trial: float = 0.0
    mean: float = math.nan
    gain: float = math.nan
    best: float = 0.0
    low: float = 0.0
    wait: float = math.nan
    before: float = math.nan
    half: float = math.nan
    cost: float = math.nan


class Switch:
    """``settings`` are those of :class:`mkor_fx.Hybrid`, whose equations these are.

    Attributes:
        trend: where it stands.
        history: ``(step, what happened)``, of this process.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        self.trend = Trend(wait=float(self.settings.patience))
        self.history: list[tuple[int, str]] = []
        self._losses: list[Tensor] = []
        self._read: list[float] = []

    @property
    def first_order(self) -> bool:
        return bool(self.trend.first_order)

    def observe(self, loss: Tensor, step: int, cost: Callable[[], float]) -> None:
        """The loss of step ``step``. It is read with the others of its window, when that ends. ``cost()`` is that of a step
        without the rule, over one with it, alike on all ranks; asked for once, when the first window ends."""
        self._losses.append(loss.detach().to(torch.float64, copy=True))
        if len(self._read) + len(self._losses) < self.settings.window:
            return
        finite = [x for x in self._numbers() if math.isfinite(x)]
        self._losses, self._read = [], []
        if finite:
            before = self.trend
            self.trend = self._after(math.fsum(finite) / len(finite), cost)
            self._note(before, step)

    def _numbers(self) -> list[float]:
        """The losses of the window that has begun."""
        if not self._losses:
            return self._read
        here = torch.stack(self._losses)
        return self._read + here.tolist()

    def _after(self, mean: float, cost: Callable[[], float]) -> Trend:
        """The trend behind a window of this mean loss."""
        trend, settings = self.trend, self.settings
        if math.isnan(trend.mean):
            return trend._replace(mean=mean, cost=cost() if settings.cost is None else settings.cost)
        gain = (trend.mean - mean) / (settings.window * (trend.cost if trend.first_order else 1.0))
        trend, last = trend._replace(mean=mean, gain=gain), gain if math.isnan(trend.gain) else trend.gain
        if trend.trial:
            return self._in_trial(trend)
        best = max(trend.best, gain)
        stays = settings.one_way and trend.first_order
        low = trend.low + 1 if gain < settings.threshold * best and not stays else 0.0
        trend = trend._replace(best=best, low=low)
        if low < trend.wait:
            return trend
        return trend._replace(before=(last + gain) / 2, first_order=1 - trend.first_order, trial=float(TRIAL))

    def _in_trial(self, trend: Trend) -> Trend:
        left = trend.trial - 1
        if left == TRIAL - 1:
            return trend._replace(trial=left)
        if left:
            return trend._replace(trial=left, half=trend.gain)
        new, settings = (trend.half + trend.gain) / 2, self.settings
        if trend.first_order:
            accepted = new >= trend.before
        else:
            accepted = new > 0 and new >= (1 + settings.hysteresis) * trend.before
        trend = trend._replace(trial=0.0, low=0.0)
        if accepted:
            return trend._replace(best=max(new, 0.0), wait=float(settings.patience))
        wait = min(2 * trend.wait, LONGEST)
        return trend._replace(first_order=1 - trend.first_order, best=max(trend.before, 0.0), wait=wait)

    def _note(self, before: Trend, step: int) -> None:
        way = "first order" if self.first_order else "second order"
        if self.trend.trial == TRIAL:
            self.history.append((step + 1, f"tries {way}"))
        elif before.trial and not self.trend.trial:
            kept = self.trend.first_order == before.first_order
            self.history.append((step + 1, f"stays with {way}" if kept else f"goes back to {way}"))

    def __str__(self) -> str:
        way = "first order" if self.first_order else "second order"
        told = "; ".join(f"step {step}: {what}" for step, what in self.history)
        return way + (f" ({told})" if told else "")

    # ---- files ----------------------------------------------------------------------------------------------------------

    def state(self) -> Tensor:
        """The trend, and how many losses the window that has begun has and which: ``[11 + window]`` float64, always as long.
        Waits for the device."""
        losses = self._numbers()
        rest = [0.0] * (self.settings.window - len(losses))
        return torch.tensor([*self.trend, float(len(losses)), *losses, *rest], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Take over a ``state()``.

        Raises:
            ValueError: it is none.
        """
        known = len(Trend._fields)
        if state.shape != (known + 1 + self.settings.window,):
            raise ValueError(
                f"the state's 'switch' has shape {tuple(state.shape)}: it is none of a Hybrid with windows of "
                f"{self.settings.window} steps"
            )
        numbers = state.tolist()
        self.reset()
        self.trend, self._read = Trend(*numbers[:known]), numbers[known + 1 : known + 1 + int(numbers[known])]
