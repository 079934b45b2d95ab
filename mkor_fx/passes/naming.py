"""Names of a model's parameters, and which of them are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from ..reasons import SKIPPED
from ..rules import Rules
from ..rules.choice import first_of


@dataclass(frozen=True)
class Naming:
    """Names of a model's trainable parameters, by identity; tied ones have their first name. ``own``: all its tensors."""

    names: dict[int, str]
    skip: tuple[str, ...] = ()
    own: frozenset[int] = frozenset()
    rules: Rules = field(default_factory=Rules)

    @classmethod
    def of(cls, model: nn.Module, skip: Sequence[str] = (), rules: Rules = Rules()) -> Naming:  # noqa: B008  (frozen)
        """Raises ValueError for a pattern of ``skip`` or of the rules that names no parameter."""
        names = {id(p): name for name, p in model.named_parameters()}
        for pattern in skip:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ValueError(
                    f"skip pattern {pattern!r} matches no parameter. Parameters: {first_of(list(names.values()))}"
                )
        rules.check_names(list(names.values()))
        return cls(names, tuple(skip), frozenset(map(id, [*model.parameters(), *model.buffers()])), rules)

    def name(self, tensor: object) -> str | None:
        return self.names.get(id(tensor))

    def excluded(self, name: str) -> str | None:
        """Why a parameter is left alone, or None."""
        patterns = [pattern for pattern in self.skip if fnmatchcase(name, pattern)]
        entry = self.rules.match(name)
        if entry is not None and entry[1] is None:
            patterns.append(entry[0])
        return SKIPPED.format(pattern=repr(patterns[0])) if patterns else None
