"""Lightning: factors are part of each of its checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..runtime.factors import FactorState


class MKORLightningCallback(Callback):
    """Keeps the factors of all compiled models inside of a ``LightningModule`` with its checkpoints.

    ``self.net = mkor_fx.compile(net)`` in the module's ``__init__`` and
    ``Trainer(callbacks=[MKORLightningCallback()])``. The module itself is not what to compile: Lightning calls its
    ``training_step``, and only what is called as ``self.net(x)`` is seen.

    Raises:
        ValueError: when training begins: nothing in the module is compiled.
    """

    def __init__(self) -> None:
        self._found: dict[str, FactorState] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        named = ((name, getattr(module, "mkor", None)) for name, module in pl_module.named_modules() if name)
        self._found = {name: factors for name, factors in named if isinstance(factors, FactorState)}
        if not self._found:
            name = type(pl_module).__name__
            raise ValueError(
                f"MKORLightningCallback: nothing inside of {name} is compiled. Compile what its training_step calls, in its "
                f"__init__, self.net = mkor_fx.compile(net): Lightning does not call the {name} itself"
            )

    def state_dict(self) -> dict[str, Any]:
        return {name: factors.state_dict() for name, factors in self._found.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, factors in self._found.items():
            if name in state_dict:
                factors.load_state_dict(state_dict[name])
