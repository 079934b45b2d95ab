"""Several optimizers in one step, seen as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class Groups(Protocol):
    """A torch optimizer, or several as one: what has groups of parameters."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Optimizers:
    """The optimizers of a step; their groups are counted one after the other, as if they were one's.

    No parameter is held by two of them. ``members`` are the user's own, live: groups may be added, numbers changed.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = tuple(members)

    @classmethod
    def of(cls, optimizer: Optimizer | Sequence[Optimizer]) -> Optimizers:
        """Of what a user passes."""
        return cls(optimizer if isinstance(optimizer, Sequence) else (optimizer,))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        if len(self.members) == 1:
            return self.members[0].param_groups
        return [group for member in self.members for group in member.param_groups]

    @property
    def names(self) -> str:
        return " + ".join(type(member).__name__ for member in self.members)

    def begins(self) -> list[tuple[Optimizer, int]]:
        """Each member, with the place of its first group."""
        found, at = [], 0
        for member in self.members:
            found.append((member, at))
            at += len(member.param_groups)
        return found

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """What is kept for a parameter, live; empty where there is nothing yet."""
        return next((member.state[param] for member in self.members if member.state.get(param)), {})


def owner_of(optimizer: Groups, at: int) -> Groups:
    """The optimizer that group ``at`` belongs to."""
    if not isinstance(optimizer, Optimizers):
        return optimizer
    return next(member for member, begin in reversed(optimizer.begins()) if begin <= at)
