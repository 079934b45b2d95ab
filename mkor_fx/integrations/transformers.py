"""transformers' Trainer: factors are saved and restored with each of its checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..runtime.factors import FactorState

FILE = "mkor_fx.pt"


class MKORTrainerCallback(TrainerCallback):
    """Writes ``mkor_fx.pt`` into each checkpoint of a ``Trainer``, and reads it where training is resumed from one.

    ``Trainer(model=mkor_fx.compile(model), args=..., callbacks=[MKORTrainerCallback()])``; nothing else of the loop changes,
    and the model's own files have the names and keys that they have without.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Every rank takes part."""
        factors = factors_of(model).state_dict()
        if state.is_world_process_zero:
            torch.save(factors, _folder(args, state) / FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        factors = factors_of(model)
        if not state.global_step:
            return
        given = args.resume_from_checkpoint
        folders = [_folder(args, state), *([Path(given)] if isinstance(given, str) else [])]
        path = next((folder / FILE for folder in folders if (folder / FILE).exists()), None)
        if path is None:
            warnings.warn(
                f"mkor_fx: training goes on from step {state.global_step}, and there is no {FILE} in "
                f"{' or '.join(map(str, folders))}: the factors start afresh. Where the checkpoint lies elsewhere, load it "
                f"before Trainer.train: model.mkor.load_state_dict(torch.load(folder + '/{FILE}'))",
                stacklevel=2,
            )
        elif factors.step != state.global_step:  # unless the user has loaded them
            factors.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def factors_of(model: Any) -> FactorState:
    """Of a compiled model, perhaps inside of a wrapper.

    Raises:
        ValueError: nothing in it is compiled.
    """
    one, seen = model, list[str]()
    while one is not None:
        if isinstance(found := getattr(one, "mkor", None), FactorState):
            return found
        seen.append(type(one).__name__)
        one = getattr(one, "module", None)
        one = one if isinstance(one, nn.Module) else None
    raise ValueError(f"{' around '.join(seen)} is not compiled: pass Trainer(model=mkor_fx.compile(model), ...)")


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
