"""The sides of a comparison of cost: how a step of each is made. All start from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import mkor_fx
from benchmarks.cases import Case, hidden
from benchmarks.hooked import HookedKFAC, HookedMKOR
from benchmarks.training import muon_for

SEED = 0
#: one training step on a case's batch; returns its loss
Step = Callable[[], Tensor]
#: makes a step, under a backend of torch.compile
Side = Callable[[Case, str], Step]
Optimizers = Callable[[nn.Module], Sequence[Optimizer]]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=1e-3)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters())]


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest."""
    return muon_for(model, hidden(model))


def soap(model: nn.Module) -> list[Optimizer]:
    """Of pytorch-optimizer, with its defaults: bases every 10 steps."""
    import pytorch_optimizer

    return [pytorch_optimizer.SOAP(model.parameters())]


def shampoo(model: nn.Module) -> list[Optimizer]:
    """Of pytorch-optimizer, whole matrices, roots every 10 steps from the first on: the cost of the method as published.
    `benchmarks.sides` trains with the library's blocks of 512, which cost less."""
    import pytorch_optimizer

    return [
        pytorch_optimizer.ScalableShampoo(
            model.parameters(), block_size=4096, start_preconditioning_step=1, preconditioning_compute_steps=10
        )
    ]


def started(case: Case) -> nn.Module:
    torch.manual_seed(SEED)
    return case.model()


def compiled(optimizers: Optimizers, rule: Any = None, every: int = 1) -> Side:
    """`mkor_fx.compile_step`: all of it one program."""

    def side(case: Case, backend: str) -> Step:
        model = started(case)
        step = mkor_fx.compile_step(
            model, case.loss_fn, list(optimizers(model)), rule=rule, refresh_every=every, backend=backend
        )
        if step.mkor is not None and step.mkor.switch is not None:  # what is timed of a Hybrid is what it falls back to
            step.mkor.switch.trend = step.mkor.switch.trend._replace(first_order=1.0)
        return lambda: step(*case.batch)

    return side


def torch_compiled(optimizers: Optimizers) -> Side:
    """`torch.compile` of the model, and of the optimizer's step."""

    def side(case: Case, backend: str) -> Step:
        model = started(case)
        return _loop(torch.compile(model, backend=backend), case, optimizers(model), backend)

    return side


def eager(optimizers: Optimizers, hooked: Callable[[nn.Module], Optimizer] | None = None) -> Side:
    """As torch runs it; ``hooked`` is a preconditioner on module hooks, in front of the optimizers."""

    def side(case: Case, backend: str) -> Step:
        model = started(case)
        front = [] if hooked is None else [hooked(model)]
        return _loop(model, case, [*front, *optimizers(model)], None)

    return side


def _loop(model: Any, case: Case, optimizers: Sequence[Optimizer], backend: str | None) -> Step:
    updates = [o.step if backend is None else torch.compile(o.step, backend=backend) for o in optimizers]

    def step() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = case.loss_fn(model(case.batch[0]), case.batch[1])
        loss.backward()
        for update in updates:
            update()
        return loss.detach()

    return step


NEVER = 10**9
SIDES: dict[str, Side] = {
    "SGD": compiled(sgd),
    "AdamW": compiled(adamw),
    "AdamW, torch.compile": torch_compiled(adamw),
    "Muon + AdamW": compiled(muon),
    "MKOR": compiled(adamw, mkor_fx.MKOR()),
    "MKOR, products in float32": compiled(adamw, mkor_fx.MKOR(product_dtype=None)),
    "MKOR, factors in bfloat16": compiled(adamw, mkor_fx.MKOR(factor_dtype=torch.bfloat16)),
    "MKOR, refresh every 10": compiled(adamw, mkor_fx.MKOR(), 10),
    "MKOR, never refreshed": compiled(adamw, mkor_fx.MKOR(), NEVER),
    "MKOR behind SGD": compiled(sgd, mkor_fx.MKOR()),
    "MKOR.published() behind SGD": compiled(sgd, mkor_fx.MKOR.published()),
    "MKOR.published() behind SGD, in bfloat16": compiled(
        sgd, mkor_fx.MKOR.published(product_dtype=torch.bfloat16, factor_dtype=torch.bfloat16)
    ),
    "MKOR.hybrid(), first order": compiled(adamw, mkor_fx.MKOR.hybrid()),
    "KFAC behind SGD": compiled(sgd, mkor_fx.KFAC()),
    "Eva behind SGD": compiled(sgd, mkor_fx.Eva()),
    "eager SGD": eager(sgd),
    "eager AdamW": eager(adamw),
    "eager hooked MKOR, SGD": eager(sgd, HookedMKOR),
    "eager hooked K-FAC, SGD": eager(sgd, HookedKFAC),
    "eager SOAP": eager(soap),
    "eager Shampoo": eager(shampoo),
}
