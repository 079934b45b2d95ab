"""What the update programs of the drop-in door are passed, as one structure: its leaves are their inputs, in order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor


class WeightTensors(NamedTuple):
    """Tensors of one weight. ``scale`` is what sizes directions that are made in the backward; ``weight`` and
    ``bias_weight`` are the parameters, where their direction is the step itself, or is bounded by their size."""

    state: dict[str, Tensor]
    grad: Any = None
    bias: Any = None
    carrier: Any = None
    scale: Any = None
    weight: Any = None
    bias_weight: Any = None


class Given(NamedTuple):
    """``clock`` is the step count; ``scales`` what a loss scaler has left in statistics and gradients; ``numbers`` those of
    the rules, ``rates`` those of the optimizer, packed. None is no input."""

    clock: Any
    weights: list[WeightTensors]
    scales: Any = None
    numbers: Any = None
    rates: Any = None

    def tensors(self) -> list[Tensor]:
        """The inputs, in order."""
        return [leaf for leaf in pytree.tree_leaves(self) if isinstance(leaf, Tensor)]

    def like(self) -> tuple[Any, ...]:
        """What a program over these inputs depends on."""
        return tuple((t.shape, t.stride(), t.dtype, t.device) for t in self.tensors())
