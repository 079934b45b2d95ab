"""A task trained many times by one compiled step, and how its curves compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import mkor_fx
from benchmarks.tasks import Task, cosine

WINDOW = 5  # evaluations averaged by `smoothed`

#: the optimizers of a task's model
Optimizers = Callable[[Task, nn.Module], list[Optimizer]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: losses after each number of steps in `evaluated`, and the median milliseconds a step takes, on the
    clock and of the processor. Earlier runs have neither mean nor capability."""

    lr: float
    seed: int
    evaluated: list[int]
    training: list[float]
    held_out: list[float]
    step_ms: float
    cpu_ms: float = math.nan
    mean_cpu_ms: float = math.nan  # with the steps that do more than others, without those that compile
    capability: str = ""  # of the processor, as torch names it; times of two are not alike

    @property
    def cost_ms(self) -> float:
        """Of the processor for a step on average, where that is known; the median otherwise."""
        return self.cpu_ms if math.isnan(self.mean_cpu_ms) else self.mean_cpu_ms

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


def adamw(task: Task, model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters())]


def sgd(task: Task, model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)]


def muon(task: Task, model: nn.Module) -> list[Optimizer]:
    """Torch's Muon for the hidden matrices of a task and AdamW for the rest."""
    return muon_for(model, task.hidden(model))


def muon_for(model: nn.Module, hidden: Sequence[Tensor]) -> list[Optimizer]:
    """Torch's Muon for ``hidden`` and AdamW for the rest. Muon's updates have the size of AdamW's (`match_rms_adamw`), so
    that one rate serves both; so does one weight decay."""
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return [
        torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.01),
    ]


class Trainer:
    """A task with its optimizers and one rule (None: the optimizers alone) in one compiled step.

    Every run starts afresh: weights, optimizers and factors are reset in place, and the learning rate is an input of the
    compiled step, so nothing is compiled again.
    """

    step: Any
    mkor: Any = None

    def __init__(
        self, task: Task, rule: Any = None, optimizers: Optimizers = adamw, *, refresh_every: int = 1,
        backend: str = "inductor",
    ) -> None:  # fmt: skip
        self.task, self.model = task, task.build(seed=0)
        self.optimizers = optimizers(task, self.model)
        self.compile(rule, refresh_every, backend)
        self.initial = deepcopy(self._state())
        started = time.perf_counter()
        for batch in task.batches(seed=0, steps=min(refresh_every, 2)):
            self.step(*batch)
        self.compile_seconds = time.perf_counter() - started

    def compile(self, rule: Any, refresh_every: int, backend: str) -> None:
        step = mkor_fx.compile_step(
            self.model, self.task.loss_fn, self.optimizers, rule, refresh_every=refresh_every, backend=backend
        )
        self.step, self.mkor = step, step.mkor

    def _state(self) -> tuple[Any, Any]:
        return [optimizer.state_dict() for optimizer in self.optimizers], self.mkor and self.mkor.state_dict()

    def reset(self, seed: int) -> None:
        """Back to the state before the first step, with the weights of `seed`."""
        self.model.load_state_dict(self.task.build(seed).state_dict())
        states, factors = deepcopy(self.initial)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        if self.mkor:
            self.mkor.load_state_dict(factors)
        torch.manual_seed(seed)  # of dropout

    def run(
        self, lr: float, seed: int, steps: int | None = None, report: Callable[[int, float], None] | None = None
    ) -> Run:
        """Trains from scratch; `report(step, training loss)` is called after every evaluation."""
        self.reset(seed)
        steps = steps or self.task.steps
        evaluated, training, held_out, seconds, busy = [], [], [], [], []
        for done, batch in enumerate(self.task.batches(seed, steps)):
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = lr * cosine(done, steps)
            started = time.perf_counter(), time.process_time()
            self.step(*batch)
            seconds.append(time.perf_counter() - started[0])
            busy.append(time.process_time() - started[1])
            if (done + 1) % self.task.evaluate_every == 0 or done + 1 == steps:
                losses = self.task.evaluate(self.model)
                evaluated.append(done + 1)
                training.append(losses[0])
                held_out.append(losses[1])
                if report:
                    report(done + 1, losses[0])
                if not math.isfinite(losses[0]):
                    break
        typical = statistics.median(busy)
        return Run(
            lr=lr,
            seed=seed,
            evaluated=evaluated,
            training=training,
            held_out=held_out,
            step_ms=1e3 * statistics.median(seconds),
            cpu_ms=1e3 * typical,
            mean_cpu_ms=1e3 * statistics.fmean(s for s in busy if s <= 50 * typical),
            capability=torch.backends.cpu.get_cpu_capability(),
        )


class EagerTrainer(Trainer):
    """For optimizers that cannot be compiled: their step is their own, on a model compiled by torch.compile, or by
    mkor_fx.compile where there is a rule; the model runs as it is with the backend "none"."""

    def compile(self, rule: Any, refresh_every: int, backend: str) -> None:
        if rule is None:
            compiled: Any = self.model if backend == "none" else torch.compile(self.model, backend=backend)
        else:
            compiled = mkor_fx.compile(self.model, rule, refresh_every=refresh_every, backend=backend)
            self.mkor = compiled.mkor

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = self.task.loss_fn(compiled(x), y)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad()
            return loss.detach()

        self.step = step
