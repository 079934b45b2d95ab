"""MKOR's schedule: the rate is cut where the loss stops falling as it did (Mozaffari et al., 2023, appendix)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class KneePointLR(LRScheduler):
    """Multiplies the rates by ``factor`` at every knee of the loss.

    The paper says in words that a knee is where the average rate of decrease falls below ``beta`` times the change since
    the current rate began; this is our reading of it. With ``x_t`` the loss of step ``t`` and ``s`` the step at which the
    current rate began:

        ``e_t = rho e_{t-1} + (1 - rho) (x_{t-1} - x_t)``, over ``1 - rho^(t-s)``;   ``a_t = (x_s - x_t) / (t - s)``
        a knee: ``e_t < beta a_t`` and ``t - s >= patience``; then ``lr <- factor lr`` and ``s = t``

    A straight line has no knee; noise needs ``rho`` near 1. A loss that is not finite is passed over. With ``delay`` the
    loss is looked at that many steps later: a tensor on a device is copied to the host meanwhile, and the step waits for
    nothing. On several ranks give each the same loss, such as the mean that a compiled step returns: they have to find the
    same knees.

        ``schedule.step(loss)`` behind every ``optimizer.step()``

    Args:
        optimizer: whose groups' rates are cut, all by the same factor.
        factor: what a rate is multiplied by, in (0, 1).
        beta: share of the average decrease below which the present one is a knee, in (0, 1).
        rho: weight of the old average, in [0, 1).
        patience: steps without a knee behind each cut, and at the start.
        delay: steps between a loss and the look at it.
        min_lr: no rate is cut below; one that lies below stays.

    Raises:
        ValueError: for an option outside its range, naming it.
        TypeError: from ``step``, without a loss.
    """

    def __init__(
        self, optimizer: Optimizer, factor: float = 0.5, beta: float = 0.5, rho: float = 0.98, patience: int = 100,
        delay: int = 1, min_lr: float = 0.0,
    ) -> None:  # fmt: skip
        for name, value in (("factor", factor), ("beta", beta)):
            if not 0 < value < 1:
                raise ValueError(f"KneePointLR({name}={value!r}): must lie in (0, 1)")
        if not 0 <= rho < 1:
            raise ValueError(f"KneePointLR(rho={rho!r}): the weight of the old average must lie in [0, 1), e.g. 0.98")
        for name, count, least in (("patience", patience, 1), ("delay", delay, 0)):
            if not isinstance(count, int) or count < least:
                raise ValueError(f"KneePointLR({name}={count!r}): must be an integer, {least} or more, in steps")
        self.factor, self.beta, self.rho, self.patience = factor, beta, rho, patience
        self.delay, self.min_lr = delay, min_lr
        self.knees: list[int] = []
        self._waiting: list[Any] = []
        self._first: float | None = None
        self._last, self._mean, self._seen = 0.0, 0.0, 0
        super().__init__(optimizer)

    def _initial_step(self) -> None:
        """The rates stay as they are until a knee; torch's schedulers would take a step here."""
        self.last_epoch = 0
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, loss: float | Tensor | None = None) -> None:  # type: ignore[override]
        """Takes the loss of the step that has just been done: a number, or a 0-dim tensor."""
        if loss is None:
            raise TypeError("KneePointLR.step(loss): pass the loss of this step; a knee is found in nothing else")
        self.last_epoch += 1
        self._waiting.append(_sent_to_host(loss) if isinstance(loss, Tensor) else loss)
        if len(self._waiting) > self.delay and self._is_knee(_arrived(self._waiting.pop(0))):
            self.knees.append(self.last_epoch)
            for group in self.optimizer.param_groups:
                rate = group["lr"]
                if isinstance(rate, Tensor):
                    rate.copy_(torch.maximum(rate * self.factor, rate.clamp(max=self.min_lr)))
                else:
                    group["lr"] = max(rate * self.factor, min(rate, self.min_lr))
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _is_knee(self, x: float) -> bool:
        if not math.isfinite(x):
            return False
        if self._first is None:
            self._first = self._last = x
            return False
        self._seen += 1
        self._mean = self.rho * self._mean + (1 - self.rho) * (self._last - x)
        self._last = x
        decrease = self._mean / (1 - self.rho**self._seen)
        average = (self._first - x) / self._seen
        if self._seen < self.patience or not decrease < self.beta * average:
            return False
        self._first, self._mean, self._seen = x, 0.0, 0
        return True

    def get_lr(self) -> list[Any]:
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; losses that wait to be looked at are read."""
        state = {name: value for name, value in vars(self).items() if name != "optimizer" and not callable(value)}
        return {**state, "_waiting": [_arrived(loss) for loss in self._waiting], "knees": list(self.knees)}


def _sent_to_host(loss: Tensor) -> Any:
    """A copy of the loss; from CUDA one on its way to the host, with the event behind it."""
    if not loss.is_cuda:
        return loss.detach().clone()
    host = torch.empty((), dtype=loss.dtype, pin_memory=True)
    host.copy_(loss.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrived(loss: Any) -> float:
    if isinstance(loss, tuple):
        loss, event = loss
        event.synchronize()
    return float(loss)
