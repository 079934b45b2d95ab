"""The loop that the demo and the sweep share: one compiled step, trained many times, and how its curves compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mkor_fx
from benchmarks.tasks import Task, cosine

WINDOW = 5  # evaluations averaged by `smoothed`


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: losses after each number of steps in `evaluated`, and the median milliseconds a step."""

    lr: float
    seed: int
    evaluated: list[int]
    training: list[float]
    held_out: list[float]
    step_ms: float

    def final(self, part: str = "training") -> float:
        """Smoothed loss at the end; infinite where the run diverged."""
        return smoothed(getattr(self, part))[-1]

    def steps_to(self, loss: float) -> int | None:
        """Steps after which the smoothed training loss is first at most `loss`; None where it never is."""
        reached = (step for step, value in zip(self.evaluated, smoothed(self.training)) if value <= loss)
        return next(reached, None)


def smoothed(losses: list[float]) -> list[float]:
    """Mean of each value and the WINDOW - 1 before it; infinite from the first value that is not finite."""
    means = []
    for end in range(1, len(losses) + 1):
        mean = statistics.fmean(losses[max(0, end - WINDOW) : end])
        means.append(mean if math.isfinite(mean) else math.inf)
    return means


class Trainer:
    """A task with AdamW and one rule (None: AdamW alone), compiled at construction.

    Every run starts afresh: weights, optimizer and factors are reset in place, and the learning rate is an input of the
    compiled step, so nothing is compiled again.
    """

    step: Any

    def __init__(self, task: Task, rule: Any = None, *, refresh_every: int = 1, backend: str = "inductor") -> None:
        self.task = task
        self.model = task.build(seed=0)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.optimizers: list[torch.optim.Optimizer] = [optimizer]
        self.step = mkor_fx.compile_step(
            self.model, task.loss_fn, optimizer, rule=rule, refresh_every=refresh_every, backend=backend
        )
        self._warm_up(min(refresh_every, 2))

    def _warm_up(self, steps: int) -> None:
        self.initial = deepcopy(self._state())
        started = time.perf_counter()
        for batch in self.task.batches(seed=0, steps=steps):
            self.step(*batch)
        self.compile_seconds = time.perf_counter() - started

    def _state(self) -> tuple[Any, Any]:
        return [optimizer.state_dict() for optimizer in self.optimizers], self.step.mkor.state_dict()

    def reset(self, seed: int) -> None:
        """Back to the state before the first step, with the weights of `seed`."""
        self.model.load_state_dict(self.task.build(seed).state_dict())
        states, factors = deepcopy(self.initial)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self._load_factors(factors)

    def _load_factors(self, factors: Any) -> None:
        self.step.mkor.load_state_dict(factors)

    def run(
        self, lr: float, seed: int, steps: int | None = None, report: Callable[[int, float], None] | None = None
    ) -> Run:
        """Trains from scratch; `report(step, training loss)` is called after every evaluation."""
        self.reset(seed)
        steps = steps or self.task.steps
        evaluated, training, held_out, seconds = [], [], [], []
        for done, batch in enumerate(self.task.batches(seed, steps)):
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = lr * cosine(done, steps)
            started = time.perf_counter()
            self.step(*batch)
            seconds.append(time.perf_counter() - started)
            if (done + 1) % self.task.evaluate_every == 0 or done + 1 == steps:
                losses = self.task.evaluate(self.model)
                evaluated.append(done + 1)
                training.append(losses[0])
                held_out.append(losses[1])
                if report:
                    report(done + 1, losses[0])
                if not math.isfinite(losses[0]):
                    break
        return Run(
            lr=lr,
            seed=seed,
            evaluated=evaluated,
            training=training,
            held_out=held_out,
            step_ms=1e3 * statistics.median(seconds),
        )


class MuonTrainer(Trainer):
    """A task with torch's Muon for the hidden matrices and AdamW for the rest, on a model compiled by torch.compile.

    Muon's updates have the size of AdamW's (`match_rms_adamw`), so that one rate serves both.
    """

    def __init__(self, task: Task, *, backend: str = "inductor") -> None:
        self.task, self.model = task, task.build(seed=0)
        hidden = task.hidden(self.model)
        rest = [p for p in self.model.parameters() if all(p is not h for h in hidden)]
        muon = torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [muon, torch.optim.AdamW(rest)]
        compiled = torch.compile(self.model, backend=backend)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = task.loss_fn(compiled(x), y)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        self.step = step
        self._warm_up(1)

    def _state(self) -> tuple[Any, Any]:
        return [optimizer.state_dict() for optimizer in self.optimizers], None

    def _load_factors(self, factors: Any) -> None:
        """Muon has none."""
