"""What rules derive behind a step, outside of its program: inverses and decompositions, each on one rank for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .factors import FactorState
from .ranks import Ranks
from .windows import Windows


class Derivations:
    """Ranks that keep a weight's state alike share the work: each derives some weights' and gets the others' (KAISA, Pauloski et
    al., 2021, arXiv 2107.01739). What of a state is derived is seen at the first time, which every rank does for itself.

    ``derive(step, recipe, state, taken)`` and ``every(recipe)`` are those of the rules, ``keepers`` the number of ranks that keep
    what has an owner.
    """

    def __init__(
        self, mkor: FactorState, derive: Callable[..., dict[str, Tensor]], every: Callable[[Any], int | None], keepers: int
    ) -> None:
        self.mkor, self._derive, self._every, self._keepers = mkor, derive, every, keepers
        self._windows = Windows(mkor)
        self._derived: dict[str, tuple[Any, list[str]]] = {}  # the recipe that it is true of, names in the state

    def run(self, names: Iterable[str], step: int, taken: Tensor | None) -> None:
        """Derive, behind ``step``, of the state that it has used, what is due; not where it was not ``taken`` (0-dim)."""
        due = {}
        for name in names:
            every = self._every(self.mkor.recipe(name))
            if every is not None and self._windows.due([name], step, every):
                due[name] = every
        if not due:
            return
        shared = [name for name in due if self._derived.get(name, (None,))[0] == self.mkor.recipe(name)]
        here, sent = set(due), list[tuple[Ranks, dict[str, int]]]()
        for ranks, has_owner in ((self.mkor.ranks, False), (self._column, True)):
            if ranks is not None and not ranks.alone:
                workers = self._divide([n for n in shared if (self.mkor.owners.get(n) is not None) == has_owner], ranks.size)
                here -= {name for name, worker in workers.items() if worker != ranks.rank}
                sent.append((ranks, workers))
        for name in due:
            if name in here:
                self._derive_here(name, step, taken)
        for ranks, workers in sent:
            spread(ranks, [(self.mkor.state(n)[key], at) for n, at in workers.items() for key in self._derived[n][1]])
        for name, every in due.items():
            self._windows.done([name], step, every)

    @property
    def _column(self) -> Ranks | None:
        ranks = self.mkor.ranks
        return None if ranks is None or self._keepers in (1, ranks.size) else ranks.grid(self._keepers)[1]

    def _divide(self, names: Sequence[str], size: int) -> dict[str, int]:
        """The rank that derives each weight's: longest processing time first, a matrix of d rows taking d^3."""
        work = {name: sum(t.shape[-1] ** 3 for t in self.mkor.state(name).values() if t.dim() > 1) for name in names}
        held, found = [0] * size, dict[str, int]()
        for name in sorted(names, key=lambda name: -work[name]):  # stable
            found[name] = held.index(min(held))
            held[found[name]] += work[name]
        return found

    def _derive_here(self, name: str, step: int, taken: Tensor | None) -> None:
        new = self.mkor.derived(name, lambda recipe, state: self._derive(step, recipe, state, taken))
        changed = [key for key, tensor in self.mkor.state(name).items() if new[key] is not tensor]
        for key in changed:
            self.mkor.state(name)[key].copy_(new[key])
        if changed:
            self._derived[name] = (self.mkor.recipe(name), changed)


def spread(ranks: Ranks, tensors: Iterable[tuple[Tensor, int]]) -> None:
    """Each tensor from the rank beside it to all, in place."""
    with torch.no_grad():
        sent = [(tensor, tensor.contiguous(), source) for tensor, source in tensors]
        on_their_way = [dist.broadcast(t, group=ranks.group, group_src=source, async_op=True) for _, t, source in sent]
        for (tensor, received, _), work in zip(sent, on_their_way, strict=True):
            work.wait()
            if received is not tensor:
                tensor.copy_(received)
