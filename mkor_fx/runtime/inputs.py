"""What a compiled step is passed beside the inputs of Dynamo's graph: each input says how it is fetched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .counters import settle_group
from .draws import draw_of


@dataclass(frozen=True)
class Call:
    """One call of a ``CompiledStep``: the arguments of Dynamo's graph, where it computes, and what the last step has
    sent."""

    step: Any
    args: Sequence[Any]
    device: torch.device
    waiting: Sequence[Tensor] = ()


class Input(ABC):
    """An input that the pipeline has added to a program."""

    @property
    def name(self) -> str:
        """Of its placeholder."""
        return f"mkor_{type(self).__name__.lower()}"

    @abstractmethod
    def fetch(self, call: Call) -> Tensor:
        """The tensor to pass."""


@dataclass(frozen=True)
class Factor(Input):
    """Entry ``key`` of the state of the parameter at ``index``."""

    index: int
    key: str

    @property
    def name(self) -> str:
        return f"mkor_factor_{self.index}_{self.key}"

    def fetch(self, call: Call) -> Tensor:
        return call.step.mkor.of(call.args[self.index])[self.key]


@dataclass(frozen=True)
class Optimizer(Input):
    """Entry ``key`` of the optimizer's state of the parameter at ``index``."""

    index: int
    key: str

    @property
    def name(self) -> str:
        return f"mkor_optimizer_{self.index}_{self.key}"

    def fetch(self, call: Call) -> Tensor:
        param, optimizers = call.args[self.index], call.step.optimizers
        held = optimizers.state_of(param).get(self.key)
        if not isinstance(held, Tensor) or held.device != param.device:  # emptied or put on the host by load_state_dict, say
            call.step.prepare_optimizer([param])
        return optimizers.state_of(param)[self.key]


@dataclass(frozen=True)
class Counter(Input):
    """What the optimizer's group ``group`` counts under ``key``."""

    group: int
    key: str

    @property
    def name(self) -> str:
        return f"mkor_counter_{self.group}_{self.key}"

    def fetch(self, call: Call) -> Tensor:
        group = call.step.optimizers.param_groups[self.group]
        if self.key not in group:
            call.step.prepare_optimizer(group["params"])
        return settle_group(group, self.key, call.device)


@dataclass(frozen=True)
class Numbers(Input):
    """The numbers of the optimizer's groups, packed."""

    def fetch(self, call: Call) -> Tensor:
        return call.step.numbers(call.device)


@dataclass(frozen=True)
class RuleNumbers(Input):
    """What changes over time in the rules, packed."""

    def fetch(self, call: Call) -> Tensor:
        return call.step.rule_numbers(call.device)


@dataclass(frozen=True)
class Steps(Input):
    """The number of steps so far, 0-dim int64."""

    def fetch(self, call: Call) -> Tensor:
        return call.step.mkor.step_tensor(call.device)


@dataclass(frozen=True)
class Draw(Input):
    """What random signs are drawn by, 0-dim int64."""

    def fetch(self, call: Call) -> Tensor:
        return draw_of(call.step.mkor.step, call.step.part.number, call.step.ranks, call.device)


@dataclass(frozen=True)
class Share(Input):
    """This part's share of the batch's rows, 0-dim float64."""

    def fetch(self, call: Call) -> Tensor:
        return torch.full((), call.step.part.share, dtype=torch.float64, device=call.device)


@dataclass(frozen=True)
class Sum(Input):
    """What the parts of a batch have come to so far."""

    key: tuple
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"mkor_sum_{'_'.join(map(str, self.key))}"

    def fetch(self, call: Call) -> Tensor:
        return call.step.sums.of(self.key, self.shape, self.dtype, call.device)


@dataclass(frozen=True)
class Warmth(Input):
    """How far the base optimizer has taken over from the rules of a ``Hybrid``, 0-dim float64."""

    def fetch(self, call: Call) -> Tensor:
        switch = call.step.mkor.switch
        return torch.full((), 1.0 if switch is None else switch.warmth, dtype=torch.float64, device=call.device)


@dataclass(frozen=True)
class Skipped(Input):
    """The number of steps that were skipped, 0-dim int64, counted in place."""

    def fetch(self, call: Call) -> Tensor:
        return call.step.gauges.make("skipped", torch.int64, call.device)


@dataclass(frozen=True)
class GradientNorm(Input):
    """The norm of all gradients before they were clipped, 0-dim float32, written in place."""

    def fetch(self, call: Call) -> Tensor:
        return call.step.gauges.make("gradient_norm", torch.float32, call.device)


@dataclass(frozen=True)
class Rows(Input):
    """The size of this rank's batch, 0-dim float: the first dimension of the step's last tensor argument."""

    def fetch(self, call: Call) -> Tensor:
        tensors = [leaf for leaf in tree_leaves(call.step.arguments) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise ValueError("average='rows' needs a tensor among the step's arguments, whose first dimension counts")
        return torch.full((), tensors[-1].shape[0], dtype=torch.float32, device=call.device)


@dataclass(frozen=True)
class Average(Input):
    """The moving average of the parameter at ``index``."""

    index: int

    @property
    def name(self) -> str:
        return f"mkor_average_{self.index}"

    def fetch(self, call: Call) -> Tensor:
        param = call.args[self.index]
        return call.step.ema.of(call.step.mkor.name(param), param)


@dataclass(frozen=True)
class Averaged(Input):
    """The number of steps that are in the averages of weights, 0-dim int64, counted in place."""

    def fetch(self, call: Call) -> Tensor:
        return call.step.ema.count(call.device)


@dataclass(frozen=True)
class Arriving(Input):
    """What the last step has sent, by position."""

    at: int

    @property
    def name(self) -> str:
        return f"mkor_late_{self.at}"

    def fetch(self, call: Call) -> Tensor:
        return call.waiting[self.at]


@dataclass(frozen=True)
class Seed(Input):
    """The gradient of the loss with respect to itself, where it is not written into the program: one."""

    dtype: torch.dtype

    def fetch(self, call: Call) -> Tensor:
        return torch.ones((), dtype=self.dtype, device=call.device)
