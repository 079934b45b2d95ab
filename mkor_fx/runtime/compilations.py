"""What is said of compilations while a run goes on: why there is another one, and what makes there be too many."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from .checkpoint import some


class Compilations:
    """Those of one model. Each kind of message is for one cause, said once for it."""

    def __init__(self) -> None:
        self._trained: set[str] | None = None
        self._lengths: set[int] = set()
        self._told = False

    def note(
        self, model: nn.Module, lengths: Collection[int], limit: int, held: Collection[int] | None = None
    ) -> None:
        """The model is being compiled now, with recurrent layers over sequences of ``lengths``; torch compiles no more than
        ``limit`` programs. ``held``: the parameters of its optimizers by identity, where they are known."""
        self._note_trained(model, held)
        self._lengths |= set(lengths)
        if not self._told and 2 * len(self._lengths) >= limit:
            self._told = True
            warnings.warn(
                f"mkor_fx: sequences of {len(self._lengths)} lengths so far "
                f"({', '.join(map(str, sorted(self._lengths)))}): a "
                "recurrent layer (nn.LSTM, nn.GRU, nn.RNN) is compiled as its time steps, so that each length is a "
                "program of its "
                f"own, and at {limit} torch.compile gives up. Pad or bucket sequences to few lengths, as multiples of "
                f"32, or raise "
                "torch._dynamo.config.recompile_limit. This is said once",
                stacklevel=3,
            )

    def _note_trained(self, model: nn.Module, held: Collection[int] | None) -> None:
        """Warn where this compilation is since parameters were frozen or thawed."""
        now = {name for name, p in model.named_parameters() if p.requires_grad}
        known, self._trained = self._trained, now
        if known is None or known == now:
            return
        changed = ((sorted(known - now), "frozen now"), (sorted(now - known), "trained now"))
        own = dict(model.named_parameters())
        lost = [name for name in sorted(now - known) if held is not None and id(own[name]) not in held]
        told = [f"{some(names)} {'are' if len(names) > 1 else 'is'} {what}" for names, what in changed if names]
        warnings.warn(
            f"mkor_fx: {' and '.join(told)} (requires_grad): {type(model).__name__} is compiled once more for that, "
            f"each of its "
            "programs; factors and optimizer state stay as they are, and going back compiles nothing"
            + (f". No optimizer holds {some(lost)}: add_param_group" if lost else ""),
            stacklevel=4,
        )
