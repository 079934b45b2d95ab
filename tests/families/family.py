"""What a family of models is to these tests: how to build it, what its parameters must become, what hooks can see of it.

Labels are written by hand from the model's code. A family's text has one line for a kind of use; braces are
alternatives, as in a shell:

    linear NAMES        NAME.weight is a site and NAME.bias, where there is one, its bias
    weight NAMES        NAME itself is a site: its gradient is made by a product
    bias NAMES of SITE  NAME is the bias of the site
    norm NAMES          NAME.weight and NAME.bias are declined: they scale and shift
    plain NAMES         NAME itself is declined: no product makes its gradient
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """``build()`` gives a model that returns its loss (or an object with ``.loss``), ``batch()`` its keyword arguments.

    ``hidden``: patterns of matrices that hooks on linear layers, plain convolutions and tables do not see; the
    comparison with the hook-based reference skips them. ``tolerance`` of that comparison, in float64 but for what the
    model itself casts to float32. ``uncovered``: matrices that a product makes and that are no sites all the same, with
    the reason.
    ``still``: sites whose factors stay the identity, since the rows of both statistics sum to zero in exact arithmetic.
    ``plain`` makes the reference's copy of the model the plainest that there is.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    labels: str
    hidden: tuple[str, ...] = ()
    tolerance: float = 1e-10
    uncovered: dict[str, str] = field(default_factory=dict)
    still: tuple[str, ...] = ()
    plain: Callable[[nn.Module], None] = lambda model: None

    def expected(self, model: nn.Module) -> dict[str, str]:
        """Every trainable parameter's role: "site", "bias of <weight>" or "declined"."""
        roles: dict[str, str] = {}
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        for line in filter(None, map(str.strip, self.labels.splitlines())):
            kind, *patterns = line.split()
            owner = patterns.pop() if kind == "bias" else ""
            for name in (name for pattern in patterns if pattern != "of" for name in braces(pattern)):
                if kind in ("linear", "norm"):
                    found = [f"{name}.{suffix}" for suffix in ("weight", "bias") if f"{name}.{suffix}" in names]
                    meant = ["site", f"bias of {name}.weight"] if kind == "linear" else ["declined"] * 2
                else:
                    found = [name]
                    meant = [{"weight": "site", "plain": "declined", "bias": f"bias of {owner}"}[kind]]
                assert found and found[0] in names, f"{self.name} has no parameter {name}"
                roles.update(zip(found, meant))
        return roles


def braces(pattern: str) -> list[str]:
    """``a.{x,y}.{0,1}`` -> ``a.x.0, a.x.1, a.y.0, a.y.1``"""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    alternatives = found[1].split(",")
    return [name for each in alternatives for name in braces(pattern[: found.start()] + each + pattern[found.end() :])]


def loss_of(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.loss


def made(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Callable[[], Batch]]:
    """The model in ``dtype`` and what draws its batches."""
    torch.manual_seed(seed)
    model = family.build().to(dtype).train()

    def batch() -> Batch:
        drawn = family.batch()
        return {key: t.to(dtype) if t.is_floating_point() else t for key, t in drawn.items()}

    return model, batch


def roles(coverage: Any) -> dict[str, str]:
    """What a coverage says, in the words of :meth:`Family.expected`."""
    return {
        entry.name: "declined" if entry.declined else f"bias of {entry.bias_of}" if entry.bias_of else "site"
        for entry in coverage
    }


@dataclass(frozen=True)
class Summary:
    """Matrices (two dimensions larger than one, gradient made by a product) and how many of them are sites."""

    family: str
    matrices: int
    covered: int
    elements: int
    covered_elements: int
    uncovered: tuple[str, ...]
    exceptions: str

    @property
    def share(self) -> float:
        return self.covered_elements / self.elements

    def __str__(self) -> str:
        return f"{self.family}: {self.covered} of {self.matrices} matrices, {self.share:.1%} of their elements"

    def row(self) -> str:
        """Its line in docs/families.md."""
        return f"| {self.family} | {self.covered} of {self.matrices} | {self.share:.1%} | {self.exceptions or 'none'} |"


def summary(family: Family, model: nn.Module, coverage: Any) -> Summary:
    """Counts over the matrices that the labels call sites, and those listed as uncovered."""
    expected = family.expected(model)
    matrices = [
        e
        for e in coverage
        if (expected[e.name] == "site" or e.name in family.uncovered) and sum(size > 1 for size in e.shape) >= 2
    ]
    covered = [e for e in matrices if e.declined is None]
    return Summary(
        family.name,
        len(matrices),
        len(covered),
        sum(e.elements for e in matrices),
        sum(e.elements for e in covered),
        tuple(e.name for e in matrices if e.declined is not None),
        "; ".join(f"`{name}`: {reason}" for name, reason in family.uncovered.items()),
    )


logging.getLogger("transformers").setLevel(logging.ERROR)
