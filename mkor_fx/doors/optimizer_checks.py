"""What optimizers must be like, checked before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..runtime.optimizers import Optimizers


def check_optimizer(model: nn.Module, optimizer: object, *, changed: bool = False) -> None:
    """A torch optimizer that can be compiled, or several, all of whose parameters are the model's and none of which two
    hold. In a model that has ``changed`` since then, they may still hold what is gone from it, as long as they hold all that
    is trained."""
    members: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not members:
        raise ValueError("optimizer=[]: pass at least one torch.optim.Optimizer")
    for at, member in enumerate(members):
        what = "optimizer" if member is optimizer else f"optimizer[{at}]"
        if not isinstance(member, Optimizer):
            given = f"the class {member.__name__}" if isinstance(member, type) else f"a {type(member).__name__}"
            raise ValueError(
                f"{what}: must be a torch.optim.Optimizer, as AdamW(model.parameters(), lr=1e-3), or a list of them, as "
                f"[Muon(...), AdamW(...)]; got {given}"
            )
        if isinstance(member, (torch.optim.LBFGS, torch.optim.SparseAdam)):
            raise ValueError(
                f"{type(member).__name__} cannot be compiled into a step; use mkor_fx.compile with your loop"
            )
        inner = [key for key, value in vars(member).items() if isinstance(value, Optimizer)]
        if inner:
            raise ValueError(
                f"{type(member).__name__} steps through another optimizer (self.{inner[0]}), which a compiled step cannot "
                "follow: pass that one, or use mkor_fx.compile with your loop"
            )
    optimizers = Optimizers.of(members)
    check_step_hooks(optimizers)
    own = {id(p) for p in model.parameters() if p.requires_grad} if changed else {id(p) for p in model.parameters()}
    held = [p for group in optimizers.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in held if id(p) not in own]
    lost = own - {id(p) for p in held}
    if foreign and (lost or not changed):
        raise ValueError(
            f"{len(foreign)} of the optimizer's {len(held)} parameters are not this model's (shapes "
            f"{foreign[:3]}{', ...' if len(foreign) > 3 else ''}): was it built over another model, or before "
            "the parameters were replaced? Build it from model.parameters()"
        )
    _check_held_once(model, optimizers)


def _check_held_once(model: nn.Module, optimizers: Optimizers) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    holder = dict[int, str]()
    for at, member in enumerate(optimizers.members):
        own = f"optimizer[{at}] ({type(member).__name__})"
        for p in (p for group in member.param_groups for p in group["params"]):
            if holder.setdefault(id(p), own) != own:
                raise ValueError(
                    f"{names.get(id(p), tuple(p.shape))} is held by {holder[id(p)]} and by {own}: which one trains it? Give "
                    "each parameter to one optimizer"
                )


def check_step_hooks(optimizers: Optimizers) -> None:
    """Raises ValueError for hooks on an optimizer's step, which a compiled step does not call."""
    for optimizer in optimizers.members:
        hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        if hooks:
            raise ValueError(
                f"the optimizer has step hooks ({hooks}), which a compiled step cannot run: remove them, or use "
                "mkor_fx.compile(model) with your own loop"
            )
