"""The sides of a comparison: optimizers and rules by the names that the command line and the tables use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mkor_fx
from benchmarks.hooked import HookedKFAC
from benchmarks.tasks import Task
from benchmarks.training import EagerTrainer, Trainer, adamw, muon, sgd
from mkor_fx.optim import COAP, LAMB, SMMF, Adalayer, HFac


def rmsprop(task: Task, model: nn.Module) -> list[Optimizer]:
    return [torch.optim.RMSprop(model.parameters(), momentum=0.9)]


def own_lamb(task: Task, model: nn.Module) -> list[Optimizer]:
    """LAMB in apex's convention: no decay, and no trust ratio, of biases and norms."""
    parts = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    decays = zip(parts, (0.01, 0.0), strict=True)
    return [LAMB([{"params": params, "weight_decay": decay} for params, decay in decays])]


def lamb(task: Task, model: nn.Module) -> list[Optimizer]:
    import pytorch_optimizer

    return [pytorch_optimizer.Lamb(model.parameters(), weight_decay=0.01)]


def soap(task: Task, model: nn.Module) -> list[Optimizer]:
    """SOAP of pytorch-optimizer (Vyas et al., 2024) with its own defaults: eigenvectors every 10 steps."""
    import pytorch_optimizer

    return [pytorch_optimizer.SOAP(model.parameters())]


def shampoo(task: Task, model: nn.Module) -> list[Optimizer]:
    """Shampoo of pytorch-optimizer (Gupta et al., 2018; Anil et al., 2020): roots every 10 steps from the tenth on,
    decoupled weight decay as AdamW's. A layer's step has the size of its gradient's signs, averaged as Adam's momentum: with
    the library's RMSProp, which lacks the correction of its start, and its summed momentum the first steps are dozens of
    times AdamW's, and on digits it ends behind AdamW at any rate."""
    import pytorch_optimizer
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return [
        pytorch_optimizer.ScalableShampoo(
            model.parameters(),
            start_preconditioning_step=10,
            preconditioning_compute_steps=10,
            moving_average_for_momentum=True,
            graft_type=LayerWiseGrafting.SQRTN,
            weight_decay=0.01,
            decoupled_weight_decay=True,
        )
    ]


def hooked_kfac(task: Task, model: nn.Module) -> list[Optimizer]:
    return [HookedKFAC(model), *adamw(task, model)]


def plainly(make: Callable[..., Optimizer], **options: Any) -> Callable[[Any, nn.Module], list[Optimizer]]:
    """With its own defaults beside ``options``."""
    return lambda task, model: [make(model.parameters(), **options)]


def of_library(name: str, **options: Any) -> Callable[[Any, nn.Module], list[Optimizer]]:
    """A class of pytorch-optimizer, its plain loop."""

    def build(task: Any, model: nn.Module) -> list[Optimizer]:
        import pytorch_optimizer

        return [getattr(pytorch_optimizer, name)(model.parameters(), foreach=False, **options)]

    return build


#: that a compiled step follows, for comparisons of base optimizers: our own, torch's, and pytorch-optimizer's
FOLLOWED = {
    "LAMB": own_lamb,
    "SMMF": plainly(SMMF),
    "Adalayer": plainly(Adalayer),
    "HFac": plainly(HFac),
    "COAP": plainly(COAP),
    "Adafactor": plainly(torch.optim.Adafactor),
    "CAME": of_library("CAME"),
    "FAdam": of_library("FAdam"),
    "SM3": of_library("SM3", momentum=0.9),
    "Signum": of_library("SignSGD"),
    "Lion": of_library("Lion"),
}
#: without a rule, in one compiled step; or behind one
COMPILED = {"AdamW": adamw, "SGD": sgd, "Muon": muon, "RMSprop": rmsprop, **FOLLOWED}
#: that cannot be compiled
EAGER = {"SOAP": soap, "Shampoo": shampoo, "Lamb": lamb}
#: whose hooks a compiled model would not run
HOOKED = {"hooked K-FAC": hooked_kfac}
NAMED = COMPILED | EAGER | HOOKED


def rule_of(side: str) -> tuple[Any, int, str]:
    """A rule written as Python; `every n`, where it refreshes less often; `behind SGD`, say, where that is not AdamW."""
    source, _, behind = side.partition(" behind ")
    source, _, every = source.partition(" every ")
    rule = eval(source, {"torch": torch, **vars(mkor_fx)})  # the command line is the user's own Python
    return rule, int(every or 1), behind or "AdamW"


def identity(side: str) -> str:
    """What a side stands for, defaults included: what a finished run is kept under."""
    if side in NAMED:
        return side
    rule, every, behind = rule_of(side)
    return f"{rule} every {every} behind {behind}"


def build(task: Task, side: str, backend: str) -> Trainer:
    """The trainer of a side."""
    rule, every, behind = (None, 1, side) if side in NAMED else rule_of(side)
    if behind in HOOKED:
        return EagerTrainer(task, None, HOOKED[behind], backend="none")
    if behind in EAGER:
        return EagerTrainer(task, rule, EAGER[behind], refresh_every=every, backend=backend)
    return Trainer(task, rule, COMPILED[behind], refresh_every=every, backend=backend)
