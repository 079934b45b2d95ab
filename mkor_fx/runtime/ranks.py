"""The processes that train one model together: they agree on what they run, start equal, and notice when they do not."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_process_group_store

from .factors import FactorState

#: steps made so far over each group: their keys in its store must not meet
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


class Ranks:
    """One compiled step's view of its process group.

    What must be equal on all ranks is exchanged through the group's store, not by a collective: a rank that is missing,
    late or different can then be named. The wait ends with the store's timeout, which is that of ``init_process_group``.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.name = group, group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.alone = self.size == 1 or dist.get_backend(group) == "fake"
        made = _made.get(group, 0)
        self._prefix, _made[group] = f"mkor_fx/{made}", made + 1
        self._store = _get_process_group_store(group)
        self._round = 0
        self._grids: dict[int, tuple[Ranks, Ranks]] = {}

    # ---- before the first step --------------------------------------------------------------------------------------

    def agree(self, plan: str) -> None:
        """Return when every rank has come here with the same ``plan``.

        Raises:
            ValueError: plans differ: names a rank and the lines, on every rank.
            RuntimeError: a rank has failed on its way here, or has not come in time; names it.
        """
        if self.alone:
            return
        key = f"{self._prefix}/{self._round}"
        self._round += 1
        if self.rank == 0:
            self._store.set(f"{key}/plan", plan)
        self._store.set(f"{key}/digest/{self.rank}", hashlib.sha256(plan.encode()).hexdigest())
        self._gather(key, "arrived", "compiled this step")
        digests = [self._store.get(f"{key}/digest/{rank}") for rank in range(self.size)]
        odd = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if odd is None:
            return
        if self.rank == odd:
            first = self._store.get(f"{key}/plan").decode()
            self._store.set(f"{key}/difference", difference(first, plan, odd))
        told = self._store.get(f"{key}/difference").decode()
        self._gather(key, "told", "read the difference")
        raise ValueError(f"ranks would run different steps: {told}")

    def failed(self, error: BaseException) -> None:
        """Tell ranks that wait in ``agree`` that this one will not come."""
        if not self.alone:
            said = f"{type(error).__name__}: {error}"
            self._store.set(f"{self._prefix}/{self._round}/error", f"rank {self.rank} failed first: {said}")

    def _gather(self, key: str, what: str, doing: str) -> None:
        """Wait until all ranks have called this."""
        self._store.set(f"{key}/{what}/{self.rank}", "1")
        patience = self._store.timeout  # type: ignore[attr-defined]
        deadline = time.monotonic() + patience.total_seconds()
        missing, pause = list(range(self.size)), 0.001
        while missing:
            missing = [rank for rank in missing if not self._store.check([f"{key}/{what}/{rank}"])]
            if missing and self._store.check([f"{key}/error"]):
                raise RuntimeError(self._store.get(f"{key}/error").decode())
            if missing and time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {self.rank} waited {patience} for rank{'s' * (len(missing) > 1)} "
                    f"{', '.join(map(str, missing))}, which has not {doing}: every rank of the process group must call "
                    "the step, equally often. If it is compiling still, give init_process_group a longer timeout"
                )
            time.sleep(pause if missing else 0)
            pause = min(2 * pause, 0.2)

    def grid(self, keepers: int) -> tuple[Ranks, Ranks]:
        """This rank's row and its column, where all stand row by row in ``keepers`` rows. All ranks must call it."""
        if keepers not in self._grids:
            columns = self.size // keepers
            row, column = divmod(self.rank, columns)
            parts = [range(row * columns, (row + 1) * columns), range(column, self.size, columns)]
            members = [[dist.get_global_rank(self.group, rank) for rank in part] for part in parts]
            groups = [dist.new_group(part, use_local_synchronization=True) for part in members]
            self._grids[keepers] = (Ranks(groups[0]), Ranks(groups[1]))
        return self._grids[keepers]

    # ---- equal replicas -----------------------------------------------------------------------------------------------

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with rank 0's."""
        if self.alone:
            return
        with torch.no_grad():
            for tensor in tensors:
                buffer = tensor.detach().contiguous()
                dist.broadcast(buffer, group=self.group, group_src=0)
                tensor.copy_(buffer)

    def number_of_first(self, number: float, device: torch.device) -> float:
        """Rank 0's number."""
        agreed = torch.tensor(number, dtype=torch.float64, device=device)
        self.copy_from_first([agreed])
        return float(agreed)

    def mean(self, tensor: Tensor) -> Tensor:
        """Over ranks."""
        if self.alone:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size

    def from_owners(
        self, tensors: dict[str, Tensor], owners: dict[str, int], device: torch.device
    ) -> dict[str, Tensor]:
        """Each of ``tensors`` from the rank that owns it; on others it may be a meta tensor of the same shape."""
        fetched = {}
        for key, owner in sorted(owners.items()):
            fetched[key] = tensors[key] if owner == self.rank else torch.empty_like(tensors[key], device=device)
            dist.broadcast(fetched[key], group=self.group, group_src=owner)
        return fetched

    def united(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of all ranks, by name; where several have one, the last rank's. On the host."""
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, {key: tensor.cpu() for key, tensor in tensors.items()}, group=self.group)
        return {key: tensor for one in held for key, tensor in one.items()}

    def compare(self, tensors: dict[str, Tensor], when: str) -> None:
        """Check that ``tensors`` are bitwise equal on all ranks: one gather of a checksum each. Shards (DTensors) differ.

        Raises:
            RuntimeError: names the first that differs, on every rank.
        """
        if self.alone:
            return
        from torch.distributed.tensor import DTensor

        tensors = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
        if not tensors:
            return
        device = next(iter(tensors.values())).device
        own = torch.stack([checksum(tensor).to(device) for tensor in tensors.values()])
        sums = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(sums, own, group=self.group)
        for rank, other in enumerate(sums):
            unequal = (other != sums[0]).nonzero().flatten().tolist()
            if unequal:
                name = list(tensors)[unequal[0]]
                raise RuntimeError(
                    f"replicas differ {when}: {name} of rank {rank} is not rank 0's ({len(unequal)} of {len(tensors)} "
                    "tensors differ). Load the same checkpoint on every rank, and change parameters, buffers, factors "
                    "and optimizer state on all ranks alike"
                )


class Replicas:
    """Compares the replicas of one model: when its factors come from outside, and every ``every`` steps.

    ``state()`` is what must be equal, by name; ``replaced()`` what rank 0 decides at the first step.
    """

    def __init__(
        self,
        ranks: Ranks | None,
        mkor: FactorState,
        every: int,
        state: Callable[[], dict[str, Tensor]],
        replaced: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.ranks, self.mkor, self.every, self.state, self.replaced = ranks, mkor, every, state, replaced
        self._generation = -1

    def check(self) -> None:
        """To be called once a step, before it begins."""
        if self.ranks is None:
            return
        step, generation = self.mkor.clock, self.mkor.generation
        if generation != self._generation:
            self.ranks.agree(f"factors at step {step}, loaded {generation} times")
            if self._generation == -1:
                self.ranks.copy_from_first(self.replaced())
            self._generation = generation
        elif not self.every or step % self.every:
            return
        self.ranks.compare(self.state(), f"before step {step}")


def state_of(model: nn.Module, mkor: FactorState) -> dict[str, Tensor]:
    """What all ranks have alike, by name: parameters, buffers, factors without an owner."""
    factors = {f"factor {key}": tensor for key, tensor in mkor.replicated().items()}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **factors}


def checksum(tensor: Tensor) -> Tensor:
    """A hash of the tensor's bits and their places, 0-dim int64, computed where the tensor is."""
    flat = tensor.detach().contiguous().reshape(-1)
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int32))
    places = torch.arange(1, words.numel() + 1, device=tensor.device)
    return ((words.to(torch.int64) + 1) * (places * 0x9E3779B1 + 1)).sum()


def difference(first: str, other: str, rank: int, most: int = 3) -> str:
    """Where two plans differ, in their own lines."""
    a, b = first.splitlines(), other.splitlines()
    only: Callable[[list[str], list[str]], list[str]] = lambda x, y: [line for line in x if line not in set(y)][:most]
    here, there = only(b, a), only(a, b)
    if not here and not there:  # the same lines in another order
        at = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        here, there = [b[at]], [a[at]]
    show = lambda lines: "".join(f"\n    {line}" for line in lines) or "\n    nothing else"
    return f"\n  rank {rank} has{show(here)}\n  rank 0 has{show(there)}"
