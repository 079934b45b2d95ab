"""What rules derive behind a step, outside of its program: inverses and decompositions, each on one rank for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import OPENED, TAKEN
from .factors import FactorState
from .ranks import Ranks
from .speeds import DerivedSizes, Speeds, workers
from .windows import Windows


class Task(NamedTuple):
    """A state to derive from, as it was behind a ``step``, and whether that was ``taken``, 0-dim (None: it was)."""

    state: dict[str, Tensor]
    step: int
    taken: Tensor | None


class Derivations:
    """Ranks that keep a weight's state alike share the work: each derives some weights' and gets the others' (KAISA,
    Pauloski et al., 2021, arXiv 2107.01739). What of a state is derived is seen at the first time, which every rank
    does for itself.

    ``derive(step, recipe, state, taken)`` and ``every(recipe)`` are those of the rules, ``keepers`` the number of ranks
    that keep what has an owner; 0: nothing is shared. ``speeds`` say what is worth sending. ``moving(recipe)`` names
    what changes in a state otherwise than by being derived.

    Weights with a slot (``FactorState.slots``) are derived so many steps later, from what their state was, which is put
    by until then (``FactorState.put_by``), and saved with it (PipeFisher, Osawa, Li and Hoefler, 2023, arXiv 2211.14133).
    """

    def __init__(
        self,
        mkor: FactorState,
        derive: Callable[..., dict[str, Tensor]],
        every: Callable[[Any], int | None],
        moving: Callable[[Any], Collection[str]],
        keepers: int,
        speeds: Speeds | None = None,
    ) -> None:
        self.mkor, self._derive, self._every, self._moving = mkor, derive, every, moving
        self._keepers, self._speeds = keepers, speeds
        self._windows = Windows(mkor)
        self._derived: dict[str, tuple[Any, list[str]]] = {}  # the recipe that it is true of, names in the state

    def run(self, names: Iterable[str], step: int, taken: Tensor | None) -> None:
        """Derive, behind ``step``, of the state that it has used, what is due; not where it was not ``taken`` (0-dim).
        Weights with a slot later in their window are put by, and those derived whose slot has come."""
        tasks, done = dict[str, Task](), dict[str, int]()
        here = {*self.mkor.names()} if self.mkor.put_by else ()
        for name in dict.fromkeys([*names, *(name for name in self.mkor.put_by if name in here)]):
            every, waits = self._every(self.mkor.recipe(name)), name in self.mkor.put_by
            if every is None:
                self.mkor.put_by.pop(name, None)
                continue
            now = step == 0 or self._windows.place(name, step, every) >= self.mkor.slots.get(name, 0)
            due = name in names and bool(self._windows.due([name], step, every))
            if waits and (now or due):
                tasks[name] = self._fetch(name)
            if due and now:
                tasks[name] = Task(self.mkor.state(name), step, taken)
            elif due:
                self._put_by(name, step, taken)
            if due:
                done[name] = every
        self._work(tasks)
        for name, every in done.items():
            self._windows.done([name], step, every)

    def _put_by(self, name: str, step: int, taken: Tensor | None) -> None:
        """Keep what a weight's state is now, of all that moves before its slot comes."""
        state = self.mkor.state(name)
        kept = {key: state[key].clone() for key in self._moving(self.mkor.recipe(name))}
        device = next(iter(state.values())).device
        kept[TAKEN] = torch.ones((), dtype=torch.bool, device=device) if taken is None else taken.clone()
        self.mkor.put_by[name] = {**kept, OPENED: torch.tensor(step)}

    def _fetch(self, name: str) -> Task:
        state, kept = self.mkor.state(name), self.mkor.put_by.pop(name)
        device = next(iter(state.values())).device
        was = {key: tensor.to(device) for key, tensor in kept.items() if key in state}
        return Task({**state, **was}, int(kept[OPENED]), kept[TAKEN].to(device))

    def _work(self, tasks: Mapping[str, Task]) -> None:
        if not tasks:
            return
        shared = [name for name in tasks if self._derived.get(name, (None,))[0] == self.mkor.recipe(name)]
        here, sent = set(tasks), list[tuple[Ranks, dict[str, int]]]()
        for ranks, has_owner in ((self.mkor.ranks, False), (self._column, True)):
            if self._keepers and ranks is not None and not ranks.alone:
                alike = [name for name in shared if (self.mkor.owners.get(name) is not None) == has_owner]
                found = workers({name: self._about(name) for name in alike}, ranks.size, self._speeds)
                at = {name: worker for name, worker in found.items() if worker is not None}
                here -= {name for name, worker in at.items() if worker != ranks.rank}
                sent.append((ranks, at))
        for name, task in tasks.items():
            if name in here:
                self._derive_here(name, task)
        for ranks, at in sent:
            made = ((name, key, rank) for name, rank in at.items() for key in self._derived[name][1])
            spread(ranks, [(self.mkor.state(name)[key], rank) for name, key, rank in made])

    @property
    def _column(self) -> Ranks | None:
        ranks = self.mkor.ranks
        return None if ranks is None or self._keepers in (0, 1, ranks.size) else ranks.grid(self._keepers)[1]

    def _about(self, name: str) -> DerivedSizes:
        return derived_of([self.mkor.state(name)[key] for key in self._derived[name][1]])

    def _derive_here(self, name: str, task: Task) -> None:
        derive = lambda recipe, state: self._derive(task.step, recipe, state, task.taken)
        new = self.mkor.derived(name, derive, task.state)
        changed = [key for key, tensor in task.state.items() if new[key] is not tensor]
        for key in changed:
            self.mkor.state(name)[key].copy_(new[key])
        if changed:
            self._derived[name] = (self.mkor.recipe(name), changed)


def derived_of(tensors: Iterable[Tensor]) -> DerivedSizes:
    """What it takes to make, and to send, what a rule has derived: a square tensor is a matrix that was inverted or
    decomposed, or a batch of them."""
    matrices, sizes = list[int](), list[int]()
    for tensor in tensors:
        sizes.append(tensor.numel() * tensor.element_size())
        if tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 0:
            matrices += [tensor.shape[-1]] * (tensor.numel() // tensor.shape[-1] ** 2)
    return DerivedSizes(tuple(matrices), tuple(sizes))


def spread(ranks: Ranks, tensors: Iterable[tuple[Tensor, int]]) -> None:
    """Each tensor from the rank beside it to all, in place."""
    with torch.no_grad():
        sent = [(tensor, tensor.contiguous(), source) for tensor, source in tensors]
        on_their_way = [dist.broadcast(t, group=ranks.group, group_src=source, async_op=True) for _, t, source in sent]
        for (tensor, received, _), work in zip(sent, on_their_way, strict=True):
            work.wait()
            if received is not tensor:
                tensor.copy_(received)
