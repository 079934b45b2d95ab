"""``python -m mkor_fx explain module:function``: what would be preconditioned, from a shell."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from .doors.explain import explain

DESCRIPTION = """\
What mkor_fx would precondition of a model, and why not the rest. Nothing is trained, computed or changed.

The function takes no arguments and returns (model, batch) or (model, batch, loss_fn); a batch is one input or a tuple of
inputs. With loss_fn the batch ends with the target: loss_fn(model(*inputs), target). Modules are found from the working
directory.
"""
EXAMPLE = "example: python -m mkor_fx explain training.models:small_gpt --html report.html --assert-full"


def parser() -> argparse.ArgumentParser:
    look = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m mkor_fx", description="Second-order optimizers as a compiler pass.")
    command = top.add_subparsers(dest="command", required=True).add_parser(
        "explain", help="what would be preconditioned", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=look
    )
    command.add_argument("target", metavar="module:function", help="returns (model, batch) or (model, batch, loss_fn)")
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    command.add_argument("--costs", action="store_true", help="print what each weight costs, too")
    command.add_argument("--html", metavar="PATH", help="write the page with graphs and source lines")
    command.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="parameters left alone (glob)")
    command.add_argument("--assert-full", action="store_true", help="exit with 1 if a matrix parameter is left out")
    command.add_argument("--allow", metavar="PATTERN", action="append", default=[], help="... but for these (glob)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 where ``--assert-full`` finds a gap, 2 for a wrong call."""
    top = parser()
    options = top.parse_args(arguments)
    if options.allow and not options.assert_full:
        top.error("--allow belongs to --assert-full")
    try:
        model, batch, loss_fn = load(options.target)
        coverage = explain(model, *batch, loss_fn=loss_fn, skip=options.skip)
        if options.html:
            coverage.to_html(options.html)
    except (ValueError, OSError) as error:
        print(f"python -m mkor_fx: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(coverage.to_json())
    else:
        print(coverage)
        if options.costs:
            print(f"\n{coverage.table(costs=True)}")
    if options.assert_full:
        try:
            coverage.assert_full(options.allow)
        except AssertionError as gaps:
            print(gaps, file=sys.stderr)
            return 1
    return 0


def load(target: str) -> tuple[nn.Module, tuple, Any]:
    """``module:function`` -> ``(model, batch, loss_fn or None)``.

    Raises:
        ValueError: no such module or function, or another return value.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"{target!r}: expected module:function, for instance training.models:small_gpt")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise ValueError(f"no module {error.name!r} in {os.getcwd()} or among the installed packages") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{module_name} ({module.__file__}) has no function {name!r}")
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        held = f" of {', '.join(type(part).__name__ for part in made)}" if isinstance(made, tuple) else ""
        raise ValueError(
            f"{target} returned a {type(made).__name__}{held}: expected (model, batch) or (model, batch, loss_fn)"
        )
    model, batch, loss_fn = (*made, None)[:3]
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"{target} returned a {type(loss_fn).__name__} as loss_fn: expected a function")
    return model, batch if isinstance(batch, tuple) else (batch,), loss_fn


if __name__ == "__main__":
    sys.exit(main())
