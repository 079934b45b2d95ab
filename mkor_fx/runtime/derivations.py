"""What rules derive behind a step, outside of its program: inverses and decompositions, each on one rank for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .factors import FactorState
from .ranks import Ranks
from .speeds import Derived, Speeds, workers
from .windows import Windows


class Derivations:
    """Ranks that keep a weight's state alike share the work: each derives some weights' and gets the others' (KAISA, Pauloski et
    al., 2021, arXiv 2107.01739). What of a state is derived is seen at the first time, which every rank does for itself.

    ``derive(step, recipe, state, taken)`` and ``every(recipe)`` are those of the rules, ``keepers`` the number of ranks that keep
    what has an owner; 0: nothing is shared. ``speeds`` say what is worth sending.
    """

    def __init__(
        self,
        mkor: FactorState,
        derive: Callable[..., dict[str, Tensor]],
        every: Callable[[Any], int | None],
        keepers: int,
        speeds: Speeds | None = None,
    ) -> None:
        self.mkor, self._derive, self._every, self._keepers, self._speeds = mkor, derive, every, keepers, speeds
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
            if self._keepers and ranks is not None and not ranks.alone:
                alike = [name for name in shared if (self.mkor.owners.get(name) is not None) == has_owner]
                found = workers({name: self._about(name) for name in alike}, ranks.size, self._speeds)
                at = {name: worker for name, worker in found.items() if worker is not None}
                here -= {name for name, worker in at.items() if worker != ranks.rank}
                sent.append((ranks, at))
        for name in due:
            if name in here:
                self._derive_here(name, step, taken)
        for ranks, at in sent:
            spread(ranks, [(self.mkor.state(name)[key], rank) for name, rank in at.items() for key in self._derived[name][1]])
        for name, every in due.items():
            self._windows.done([name], step, every)

    @property
    def _column(self) -> Ranks | None:
        ranks = self.mkor.ranks
        return None if ranks is None or self._keepers in (0, 1, ranks.size) else ranks.grid(self._keepers)[1]

    def _about(self, name: str) -> Derived:
        return derived_of([self.mkor.state(name)[key] for key in self._derived[name][1]])

    def _derive_here(self, name: str, step: int, taken: Tensor | None) -> None:
        new = self.mkor.derived(name, lambda recipe, state: self._derive(step, recipe, state, taken))
        changed = [key for key, tensor in self.mkor.state(name).items() if new[key] is not tensor]
        for key in changed:
            self.mkor.state(name)[key].copy_(new[key])
        if changed:
            self._derived[name] = (self.mkor.recipe(name), changed)


def derived_of(tensors: Iterable[Tensor]) -> Derived:
    """What it takes to make, and to send, what a rule has derived: a square tensor is a matrix that was inverted or decomposed,
    or a batch of them."""
    matrices, sizes = list[int](), list[int]()
    for tensor in tensors:
        sizes.append(tensor.numel() * tensor.element_size())
        if tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 0:
            matrices += [tensor.shape[-1]] * (tensor.numel() // tensor.shape[-1] ** 2)
    return Derived(tuple(matrices), tuple(sizes))


def spread(ranks: Ranks, tensors: Iterable[tuple[Tensor, int]]) -> None:
    """Each tensor from the rank beside it to all, in place."""
    with torch.no_grad():
        sent = [(tensor, tensor.contiguous(), source) for tensor, source in tensors]
        on_their_way = [dist.broadcast(t, group=ranks.group, group_src=source, async_op=True) for _, t, source in sent]
        for (tensor, received, _), work in zip(sent, on_their_way, strict=True):
            work.wait()
            if received is not tensor:
                tensor.copy_(received)
