"""What is preconditioned, and why not: one line for every trainable parameter."""

from __future__ import annotations

from dataclasses import dataclass, field

import tabulate
import torch
from torch import nn

from .ir import Decline, StepGraph
from .passes.rewrite import Layout
from .rules import Rule

#: of a parameter that no captured graph has shown yet
UNSEEN = Decline("not seen in a graph with gradients")


@dataclass(frozen=True)
class Entry:
    """One trainable parameter. ``factors`` are the shapes of its state; ``declined`` is None for what is covered."""

    name: str
    shape: tuple[int, ...]
    op: str = ""
    uses: int = 0
    factors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    state_bytes: int = 0
    sent: int = 0
    bias_of: str = ""
    declined: Decline | None = None

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class Coverage:
    """The trainable parameters of a model in order, each preconditioned or declined with its reason.

    ``print(coverage)`` is a table; ``covered`` and ``declined`` are lists of entries; ``share()`` the fractions covered.
    """

    def __init__(self, model: nn.Module, rule: Rule | None) -> None:
        self._rule = rule
        self._entries = {
            name: Entry(name, tuple(p.shape), declined=UNSEEN)
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def add(self, step: StepGraph, names: dict[int, str] | None = None) -> None:
        """Take over the roles found in one captured graph. A parameter declined in any graph is declined.

        ``names`` by input position where the graph serves another instance than the one it was captured from.
        """
        names = names or {index: parameter.name for index, parameter in step.parameters.items()}
        for site in step.sites.values():
            layout = Layout.of(site)
            assert self._rule is not None
            state = layout.fresh_state(self._rule)(torch.device("meta"))
            sent = layout.statistics_size(self._rule) * len(site.kinds)
            ops = "+".join(dict.fromkeys(tap.op for tap in site.taps)) + (" of f(W)" if site.parametrized else "")
            self._merge(
                Entry(
                    names[site.parameter.index],
                    site.parameter.shape,
                    ops,
                    len(site.taps),
                    {key: tuple(t.shape) for key, t in state.items()},
                    sum(t.numel() * t.element_size() for t in state.values()),
                    sent,
                )
            )
            if site.bias is not None:
                self._merge(
                    Entry(
                        names[site.bias.index],
                        site.bias.shape,
                        "bias",
                        len(site.taps),
                        bias_of=names[site.parameter.index],
                    )
                )
        for index, decline in step.declines.items():
            self._merge(Entry(names[index], step.parameters[index].shape, declined=decline))

    def decline(self, name: str, decline: Decline) -> None:
        self._merge(Entry(name, self._entries[name].shape, declined=decline))

    def _merge(self, entry: Entry) -> None:
        known = self._entries.get(entry.name)
        if known is None or known.declined is UNSEEN or (entry.declined is not None and known.declined is None):
            self._entries[entry.name] = entry

    def __iter__(self):
        return iter(self._entries.values())

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    @property
    def covered(self) -> list[Entry]:
        return [entry for entry in self if entry.declined is None]

    @property
    def declined(self) -> list[Entry]:
        return [entry for entry in self if entry.declined is not None]

    def share(self) -> tuple[float, float]:
        """Covered share of the trainable parameters and of their elements."""
        total = sum(entry.elements for entry in self)
        elements = sum(entry.elements for entry in self.covered)
        return len(self.covered) / max(1, len(self._entries)), elements / max(1, total)

    def __str__(self) -> str:
        rows = []
        for e in self:
            factors = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in e.factors.items())
            note = str(e.declined) if e.declined is not None else (f"L of {e.bias_of}" if e.bias_of else factors)
            numbers = [e.uses or "", f"{e.state_bytes:,}" if e.state_bytes else "", f"{e.sent:,}" if e.sent else ""]
            op = "declined" if e.declined is not None else e.op
            rows.append([e.name, "x".join(map(str, e.shape)) or "scalar", op, *numbers, note])
        headers = ["parameter", "shape", "op", "uses", "state bytes", "sent", "factors, or why not"]
        by_number, by_element = self.share()
        return (
            tabulate.tabulate(
                rows,
                headers,
                tablefmt="simple",
                disable_numparse=True,
                colalign=("left", "left", "left", "right", "right", "right", "left"),
            )
            + f"\n{len(self.covered)} of {len(self._entries)} trainable parameters preconditioned ({by_number:.0%}), "
            f"{by_element:.1%} of their elements; state {sum(e.state_bytes for e in self):,} bytes, "
            f"{sum(e.sent for e in self):,} numbers of statistics a refresh"
        )
