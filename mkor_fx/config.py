"""Options of the two doors, validated before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .passes.backend import BACKENDS, inductor_options
from .rules import Rule


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both doors take beside the rule; names and meanings of torch.compile's where it has them."""

    refresh_every: int = 1
    skip: Sequence[str] = ()
    backend: str = "inductor"
    dynamic: bool | None = None
    fullgraph: bool = False
    mode: str | None = None
    options: dict[str, Any] | None = None
    placement: str = "replicated"
    stale: int = 0
    inductor: dict[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.refresh_every, int) or isinstance(self.refresh_every, bool) or self.refresh_every < 1:
            raise ValueError(
                f"refresh_every={self.refresh_every!r}: must be an integer of at least 1, steps per refresh"
            )
        if self.placement not in ("replicated", "owner"):
            raise ValueError(f"placement={self.placement!r}: must be 'replicated' or 'owner'")
        if self.stale not in (0, 1):
            raise ValueError(
                f"stale={self.stale!r}: must be 0 (statistics refresh in their own step) or 1 (in the next)"
            )
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend={self.backend!r}: must be one of {', '.join(BACKENDS)} ('eager' runs the rewritten "
                "graph without compiling it)"
            )
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        if self.mode is not None and self.options is not None:
            raise ValueError("give either mode or options, as with torch.compile")
        object.__setattr__(self, "inductor", inductor_options(self.mode, self.options))


def check_model(model: object) -> None:
    """A module with at least one trainable parameter."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected an nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: nothing to precondition. Set requires_grad, "
            "or use torch.compile for inference"
        )


def check_rule(rule: object) -> None:
    if not isinstance(rule, Rule):
        raise ValueError(f"rule={rule!r}: must be an update rule such as mkor_fx.MKOR()")


def check_optimizer(model: nn.Module, optimizer: object) -> None:
    """A torch optimizer that can be compiled, all of whose parameters are the model's."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer instance")
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise ValueError(
            f"{type(optimizer).__name__} cannot be compiled into a step; use mkor_fx.compile with your loop"
        )
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    if hooks:
        raise ValueError(
            f"the optimizer has step hooks ({hooks}), which a compiled step cannot run: remove them, or use "
            "mkor_fx.compile(model) with your own loop"
        )
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in held if id(p) not in own]
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the optimizer's {len(held)} parameters are not this model's (shapes "
            f"{foreign[:3]}{', ...' if len(foreign) > 3 else ''}): was it built over another model, or before "
            "the parameters were replaced? Build it from model.parameters()"
        )
