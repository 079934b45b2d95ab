"""What Dynamo's errors say to the user: what failed, in which line of whose code, on what arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def failed_call(failure: Exception, args: tuple, kwargs: dict[str, Any]) -> RuntimeError:
    """The user's own error in place of Dynamo's ``failure``: an operation cannot be run on what it was given."""
    given = ", ".join(_described(args, kwargs))
    return RuntimeError(f"called with {given}: {_reason(str(failure))} ({_place(failure)}). Nothing was changed")


#: under which torch.compile raises where it would compile
STANCE = "fail_on_recompile"


def recompile_forbidden(failure: Exception) -> RuntimeError:
    """What a call under that stance says."""
    found = re.findall(r"^\s*- \S+: (.+)$", str(failure), re.MULTILINE)
    why = f"another program, since {'; '.join(dict.fromkeys(found))}" if found else "a program that is not there yet"
    return RuntimeError(
        f"torch.compiler.set_stance({STANCE!r}) forbids to compile, and this call needs {why}. Nothing was changed: "
        f"make the "
        "first call, and that of each new size, under the default stance"
    )


def _reason(text: str) -> str:
    """Torch's own sentence in what Dynamo has wrapped around it."""
    found = re.search(r"got \w+\((['\"])(.*?)\1\)$", text, re.MULTILINE)
    found = found or re.search(r"debug context: \w+ <.*?>: ()(.+)", text)
    if found:
        return found.group(2).replace("\\n", " ").rstrip(".")
    explained = re.search(r"Explanation: (.+)", text)
    return (explained.group(1) if explained else text.splitlines()[0]).rstrip(".!")


def _place(failure: Any) -> str:
    """The innermost line that is neither torch's nor this package's, else the innermost."""
    frames = list(getattr(failure, "real_stack", None) or ())
    libraries = tuple(os.path.dirname(path) for path in (torch.__file__, os.path.dirname(os.path.dirname(__file__))))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not (own or frames):
        return "in the model or its loss"
    frame = (own or frames)[-1]
    where = frame.filename if own else os.path.join(*frame.filename.split(os.sep)[-3:])
    return f"{where}:{frame.lineno}, in {frame.name}: {frame.line}"


def _described(args: tuple, kwargs: dict[str, Any]) -> Iterator[str]:
    for name, value in [*((None, arg) for arg in args), *kwargs.items()]:
        leaves = pytree.tree_leaves(value)
        shown = _tensor(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in leaves):
            shown += f" of {', '.join(_tensor(leaf) for leaf in leaves if isinstance(leaf, Tensor))}"
        yield shown if name is None else f"{name}={shown}"


def _tensor(tensor: Tensor) -> str:
    device = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{device}"
