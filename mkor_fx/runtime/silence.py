"""Saying once, by name, that parameters reach an optimizer's step without statistics, and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .carriers import local
from .checkpoint import some
from .factors import FactorState


@dataclass
class Seen:
    """What has happened to a compiled model since its last step."""

    called: bool = False
    ran: bool = False
    backward: bool = False
    inside: bool = False

    def forget_failed(self) -> None:
        """A new forward begins: a backward that has not ended by now has raised."""
        self.backward &= not self.inside
        self.inside = False

    def why(self, shown: bool) -> str:
        """Why there are no statistics, and what to do, for weights that a graph has ``shown`` or not."""
        if self.inside:
            return (
                "the optimizer stepped inside of the backward, before they had arrived. Step behind it, or use "
                "mkor_fx.compile(model, MKOR.published(), precondition='backward')"
            )
        if self.ran and not shown:
            return (
                "they ran outside of every graph: their layer is one that torch.compile was told to leave alone, or "
                "could not "
                "capture (TORCH_LOGS=graph_breaks tells)"
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
                "torch.compile ran the forward eagerly, at its recompile limit (TORCH_LOGS=recompiles tells why: pad "
                "inputs to "
                "few sizes), under set_stance or where it is disabled"
            )
        return (
            "the compiled model was not called. Only its forward is compiled, and only where it is called itself: not the "
            "model that it was made of, not another method, not inside of a torch.compile around it"
        )


def warn_of_fresh_factors(mkor: FactorState, states: Iterable[dict[str, Any]], optimizer: str) -> None:
    """Before a first step with factors that nobody has loaded, beside an optimizer whose ``states`` are of steps taken."""
    if mkor.clock == mkor.generation == 0 and any(map(_has_stepped, states)):
        warnings.warn(
            f"mkor_fx: {optimizer} has stepped these parameters before, and the factors start afresh. If this run is "
            f"resumed, save "
            "model.mkor.state_dict() (or step.mkor.state_dict()) with each checkpoint and give it to mkor.load_state_dict "
            "before the first step",
            stacklevel=2,
        )


class Silence:
    """Ends a silence: warns of each parameter once."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._looked: Counter[str] = Counter()

    def break_for(self, suspects: Iterable[tuple[str, nn.Parameter, bool]], seen: Callable[[], Seen]) -> None:
        """Warn of those ``suspects`` whose gradient is not zero. That waits for the device, ever more seldom."""
        looked = [suspect for suspect in suspects if suspect[0] not in self._told and self._looks(suspect[0])]
        silent = [(name, shown) for name, param, shown in looked if _moves(param)]
        for shown in (True, False):
            names = [name for name, was_shown in silent if was_shown is shown]
            if names:
                self._told.update(names)
                warnings.warn(
                    f"mkor_fx does not precondition {some(names)} in this step: the gradient came without statistics, since "
                    f"{seen().why(shown)}. The optimizer steps on the raw gradient. This is said once for each parameter.",
                    stacklevel=2,
                )

    def _looks(self, name: str) -> bool:
        """At the first, second, fourth, eighth ... time."""
        self._looked[name] += 1
        return not self._looked[name] & (self._looked[name] - 1)


def _has_stepped(state: dict[str, Any]) -> bool:
    count = state.get("step")
    return state.get("momentum_buffer") is not None if count is None else bool(count > 0)


def _moves(param: nn.Parameter) -> bool:
    return param.grad is not None and bool((local(param.grad) != 0).any())
