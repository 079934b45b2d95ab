"""Saying once, by name, that parameters reach an optimizer's step without statistics, and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from .carriers import local
from .checkpoint import some


@dataclass
class Seen:
    """What has happened to a compiled model since its last step."""

    called: bool = False
    ran: bool = False
    backward: bool = False
    inside: bool = False

    def why(self) -> str:
        """Why there are no statistics, and what to do."""
        if self.inside:
            return (
                "the optimizer stepped inside of the backward, before they had arrived. Step behind it, or use "
                "mkor_fx.compile(model, precondition='backward')"
            )
        if self.backward:
            return (
                "the backward was not asked for them, as by backward(inputs=...) or torch.autograd.grad: call "
                "loss.backward()"
            )
        if self.ran:
            return "no backward went through what the compiled model has returned"
        if self.called:
            return (
                "torch.compile ran the forward eagerly, at its recompile limit (TORCH_LOGS=recompiles tells why), under "
                "set_stance or where it is disabled"
            )
        return (
            "the compiled model was not called. Only its forward is compiled, and only where it is called itself: not the "
            "model that it was made of, not another method, not inside of a torch.compile around it"
        )


class Silence:
    """Ends a silence: warns of each parameter once."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._looked: Counter[str] = Counter()

    def break_for(self, suspects: Iterable[tuple[str, nn.Parameter]], seen: Callable[[], Seen]) -> None:
        """Warn of those ``suspects`` whose gradient is not zero. That waits for the device, ever more seldom."""
        looked = [(name, param) for name, param in suspects if name not in self._told and self._looks(name)]
        silent = [name for name, param in looked if param.grad is not None and bool((local(param.grad) != 0).any())]
        if not silent:
            return
        self._told.update(silent)
        warnings.warn(
            f"mkor_fx does not precondition {some(silent)} in this step: the gradient came without statistics, since "
            f"{seen().why()}. The optimizer steps on the raw gradient. This is said once for each parameter.",
            stacklevel=2,
        )

    def _looks(self, name: str) -> bool:
        """At the first, second, fourth, eighth ... time."""
        self._looked[name] += 1
        return not self._looked[name] & (self._looked[name] - 1)
