"""When a run leaves its rule for the base optimizer, and when it comes back: by the losses of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

#: windows of a trial: one passed over, two that count
TRIAL = 3
#: the patience doubles no further
LONGEST = 64.0
#: standard errors by which two gains have to differ to be told apart
SURE = 2.0


class Mean(NamedTuple):
    """Of the losses of a window: their mean, and its variance by their scatter around straight lines, in which a trend
    has no part. NaN: not known yet."""

    value: float = math.nan
    variance: float = math.nan

    @classmethod
    def of(cls, losses: list[float]) -> Mean:
        bends = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:])]
        scatter = math.fsum(bend * bend for bend in bends) / (6 * len(bends)) if bends else 0.0
        return cls(math.fsum(losses) / len(losses), scatter / len(losses))


class Gain(NamedTuple):
    """How far the loss has fallen, for what that has cost: the estimate and its variance."""

    value: float = math.nan
    variance: float = math.nan

    @classmethod
    def between(cls, before: Mean, after: Mean, cost: float) -> Gain:
        return cls((before.value - after.value) / cost, (before.variance + after.variance) / cost**2)

    def over(self, other: Gain | float) -> float:
        """By how many standard errors it is larger; infinite where they are known without error and differ."""
        value, variance = (other.value, other.variance) if isinstance(other, Gain) else (other, 0.0)
        difference, error = self.value - value, math.sqrt(self.variance + variance)
        return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


def part_of_the_way(weight: Tensor, new: Tensor, share: Tensor | float) -> Tensor:
    """``W + s (W' - W)``, in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    start, share = weight.to(wide), share.to(wide) if isinstance(share, Tensor) else share
    return (start + share * (new.to(wide) - start)).to(weight.dtype)


class Trend(NamedTuple):
    """All that decisions depend on, as numbers. NaN: not known yet.

    ``first_order``: 1 without the rule. ``trial``: windows that are left of one. ``last``: losses of the last window;
    ``start`` of the one in front of those below the threshold, or of the one in front of the trial's that count.
    ``best`` gain since the last trial; ``low``: windows below the threshold, of ``wait``; ``before``: gain in front of
    the trial. ``cost`` of a step without the rule, over one with it.
    """

    first_order: float = 0.0
    trial: float = 0.0
    last: Mean = Mean()
    start: Mean = Mean()
    best: float = 0.0
    low: float = 0.0
    wait: float = math.nan
    before: Gain = Gain()
    cost: float = math.nan


class Switch:
    """``settings`` are those of :class:`mkor_fx.Hybrid`, whose equations these are.

    Attributes:
        trend: where it stands.
        history: ``(step, what happened)``, of this process.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        #: where a loop tells of losses: what a step of the base costs, and what ranks make of theirs
        self.listens: tuple[Callable[[], float], Callable[[Tensor], Tensor]] | None = None
        #: whether it has been told of any
        self.told = False
        self.reset()

    def reset(self) -> None:
        self.trend = Trend(wait=float(self.settings.patience))
        self.history: list[tuple[int, str]] = []
        self._losses: list[Tensor] = []
        self._read: list[float] = []

    @property
    def first_order(self) -> bool:
        return bool(self.trend.first_order)

    @property
    def warmth(self) -> float:
        """The share of its steps that the base optimizer takes: they grow in the window that no trial counts, whose averages
        are of few gradients."""
        if self.trend.trial < TRIAL:
            return 1.0
        return (len(self._read) + len(self._losses) + 1) / self.settings.window

    def observe(
        self, loss: Tensor, step: int, cost: Callable[[], float], agree: Callable[[Tensor], Tensor] = lambda losses: losses
    ) -> None:
        """The loss of step ``step``. It is read with the others of its window, when that ends. ``cost()`` is that of a step
        without the rule, over one with it, alike on all ranks; asked for once, when the first window ends. ``agree``
        makes the losses of all ranks of what each has seen in a window."""
        self.told = True
        self._losses.append(loss.detach().to(torch.float64, copy=True))
        if len(self._read) + len(self._losses) < self.settings.window:
            return
        finite = [x for x in self._numbers(agree) if math.isfinite(x)]
        self._losses, self._read = [], []
        if finite:
            before = self.trend
            self.trend = self._after(Mean.of(finite), cost)
            self._note(before, step)

    def tell(self, loss: Any, step: int) -> None:
        """As ``observe``, from a loop.

        Raises:
            ValueError: nobody is to tell, or ``loss`` is none.
        """
        if self.listens is None:
            raise ValueError("mkor.observe(loss) is for mkor_fx.compile: a compiled step sees its own loss")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"mkor.observe(loss): must be a tensor with one number, got {loss!r}")
        self.observe(loss.reshape(()), step, *self.listens)

    def _numbers(self, agree: Callable[[Tensor], Tensor] = lambda losses: losses) -> list[float]:
        """The losses of the window that has begun."""
        return self._read + (agree(torch.stack(self._losses)).tolist() if self._losses else [])

    def _after(self, mean: Mean, cost: Callable[[], float]) -> Trend:
        """The trend behind a window of this mean loss."""
        trend, settings = self.trend, self.settings
        if math.isnan(trend.last.value):
            return trend._replace(last=mean, cost=cost() if settings.cost is None else settings.cost)
        window = settings.window * (trend.cost if trend.first_order else 1.0)
        gain = Gain.between(trend.last, mean, window)
        before, trend = trend.last, trend._replace(last=mean)
        if trend.trial:
            return self._in_trial(trend, window)
        trend = trend._replace(best=max(trend.best, gain.value))
        if settings.one_way and trend.first_order:
            return trend
        rises = trend.first_order and gain.over(0.0) < -SURE
        if not rises and gain.over(settings.threshold * trend.best) >= -SURE:
            return trend._replace(low=0.0)
        low = trend.low + 1
        trend = trend._replace(low=low, start=trend.start if trend.low else before)
        if low < trend.wait and not rises:
            return trend
        old = Gain.between(trend.start, mean, low * window)
        return trend._replace(before=old, start=mean, first_order=1 - trend.first_order, trial=float(TRIAL))

    def _in_trial(self, trend: Trend, window: float) -> Trend:
        """Behind a window of a trial. ``start`` is the window in front of the trial; once one has been passed over,
        that one."""
        left = trend.trial - 1
        if trend.first_order and Gain.between(trend.start, trend.last, 1.0).over(0.0) < -SURE:
            return self._settled(trend, accepted=False)  # the loss rises: no need to wait for the end
        if left:
            passed = left == TRIAL - 1
            return trend._replace(trial=left, start=trend.last if passed else trend.start)
        old, new = trend.before, Gain.between(trend.start, trend.last, (TRIAL - 1) * window)
        if trend.first_order:
            flat, better = old.over(0.0) <= SURE, new.over(old)
            return self._settled(trend, better >= SURE or (flat and better >= -SURE), new.value)
        ask = Gain((1 + self.settings.hysteresis) * old.value, old.variance)
        return self._settled(trend, new.over(0.0) > SURE and new.over(ask) >= 0.0, new.value)

    def _settled(self, trend: Trend, accepted: bool, gain: float = 0.0) -> Trend:
        trend = trend._replace(trial=0.0, low=0.0)
        if accepted:
            return trend._replace(best=max(gain, 0.0), wait=float(self.settings.patience))
        wait = min(2 * trend.wait, LONGEST)
        return trend._replace(first_order=1 - trend.first_order, best=max(trend.before.value, 0.0), wait=wait)

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
        """The trend, and how many losses the window that has begun has and which, float64, always as long. Waits for
        the device."""
        losses = self._numbers()
        rest = [0.0] * (self.settings.window - len(losses))
        return torch.tensor([*pytree.tree_leaves(self.trend), float(len(losses)), *losses, *rest], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Take over a ``state()``.

        Raises:
            ValueError: it is none.
        """
        leaves, spec = pytree.tree_flatten(self.trend)
        known = len(leaves)
        if state.shape != (known + 1 + self.settings.window,):
            raise ValueError(
                f"the state's 'switch' has shape {tuple(state.shape)}: it is none of a Hybrid with windows of "
                f"{self.settings.window} steps"
            )
        numbers = state.tolist()
        self.reset()
        self.trend = pytree.tree_unflatten(numbers[:known], spec)
        self._read = numbers[known + 1 : known + 1 + int(numbers[known])]
