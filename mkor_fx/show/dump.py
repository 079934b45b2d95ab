"""``MKOR_FX_DUMP=dir``: every stage and every pass of every program as numbered files, before and after."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import fx

VARIABLE = "MKOR_FX_DUMP"


class Dump:
    """Files of one program, ``<dir>/000_GPT_refresh_step/03_rewrite.after.py``; does nothing where the variable is unset.

    Folders are numbered in order of compilation, by what lies in the directory already: several processes may share it, and
    ranks of one group name theirs ``000_rank1_GPT_refresh_step``.

    Raises:
        ValueError: the directory cannot be written.
    """

    def __init__(self, title: str) -> None:
        root = os.environ.get(VARIABLE)
        self._folder = _numbered_folder(Path(root), title) if root else None

    def write(self, name: str, module: fx.GraphModule) -> None:
        """The module's graph as Python code, with shapes and the user's source lines."""
        if self._folder is None:
            return
        path = self._folder / f"{name}.py"
        try:
            path.write_text(module.print_readable(print_output=False) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error


def pass_name(function: Any) -> str:
    """Name of a pass, behind options that are bound to it."""
    function = getattr(function, "func", function)
    return getattr(function, "name", None) or function.__name__.strip("<>")


def _numbered_folder(root: Path, title: str) -> Path:
    slug = _rank() + re.sub(r"\W+", "_", title).strip("_")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(sum(1 for _ in root.glob(f"*_{_rank()}*"))):
            if any(root.glob(f"{number:03}_{_rank()}*")):
                continue
            folder = root / f"{number:03}_{slug}"
            with contextlib.suppress(FileExistsError):  # another process was quicker
                folder.mkdir()
                return folder
    except OSError as error:
        raise _unwritable(root, error) from error
    raise AssertionError("unreachable")


def _rank() -> str:
    """``rank1_`` in a group of several processes."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return f"rank{dist.get_rank()}_" if several else ""


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{VARIABLE}={os.environ.get(VARIABLE)!r}: cannot write {path} ({error.strerror}); name a directory that can be "
        "written, or unset the variable"
    )
