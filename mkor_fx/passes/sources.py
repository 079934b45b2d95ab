"""What a compiled program was made by, as a hash: part of the key under which compilers keep it."""

from __future__ import annotations

import functools
import hashlib
import inspect
from pathlib import Path

from ..rules import Rules

_PACKAGE = Path(__file__).parents[1]


def library_sources(rules: Rules = Rules()) -> bytes:  # noqa: B008  (frozen)
    """Of every source file of the library, and of the rules' own where they are defined outside of it."""
    digest = hashlib.sha256(_own())
    for rule in rules:
        for cls in type(rule).__mro__:
            if not cls.__module__.startswith(("mkor_fx.", "builtins", "abc")):
                digest.update(_source_of(cls).encode())
    return digest.digest()


@functools.cache
def _own() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    return digest.digest()


def _source_of(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # typed into an interpreter: its name has to do
        return f"{cls.__module__}.{cls.__qualname__}"
