"""What is preconditioned, and why not: one entry for every trainable parameter."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..ir import Decline, Site, StepGraph, source_line
from ..passes.match.layout import Layout
from ..passes.write.sizing import trainer_of
from ..runtime.checkpoint import some
from ..runtime.optimizer_state import groups_of
from ..runtime.optimizers import Groups
from .costs import Costs, Work, aligned, cost_table, count_costs
from .entries import UNSEEN, Entry, Fractions, share_of, shared_by_bias, times, unseen
from .graphs import ModelGraphs
from .recorder import module_path


class Coverage:
    """The trainable parameters of a model in order, each preconditioned or declined with its reason.

    ``print(coverage)`` is a table, ``table(costs=True)`` what each weight costs, ``to_json()`` everything; ``covered`` and
    ``declined`` are lists of entries; ``graphs`` the programs seen so far and ``to_html(path)`` a page of it all.
    ``trainers`` says by name who trains a parameter, once an optimizer is known; ``switch`` what a
    ``Hybrid`` does now; ``rotation`` which weights refresh when; ``owners`` which rank keeps the factors of which, and
    ``local`` that it takes their statistics alone, so that none cross the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graphs = ModelGraphs(self, type(model).__name__)
        self._model, self._entries = weakref.ref(model), unseen(model)
        self.trainers: dict[str, str] = {}
        self.switch: Any = None
        self.rotation: Any = None
        self.owners: Mapping[str, int | None] = {}
        self.local = False

    def forget(self, model: nn.Module) -> None:
        """The model has changed: what its parameters are is to be seen anew."""
        self._entries = unseen(model)
        self.trainers.clear()

    def trained_by(self, optimizer: Groups, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take note of who trains what: ``optimizer`` holds those of its parameters that are ``named``."""
        groups = groups_of(optimizer)
        for name, param in named:
            if id(param) in groups and name in self._entries:
                entry = self._entries[name]
                rule = None if entry.declined is not None else (self._entries[entry.bias_of or name].rule)
                self.trainers[name] = trainer_of(rule, optimizer, groups[id(param)])

    def add(self, step: StepGraph, names: dict[int, str] | None = None) -> None:
        """Take over the roles found in one captured graph. A parameter declined in any graph is declined.

        ``names`` by input position where the graph serves another instance than the one it was captured from.
        """
        names = names or {index: parameter.name for index, parameter in step.parameters.items()}
        for site in step.sites.values():
            entry = self._site_entry(site, names[site.parameter.index])
            self._merge(entry)
            if site.bias is not None:
                self._merge(
                    Entry(
                        names[site.bias.index],
                        site.bias.shape,
                        "bias",
                        entry.uses,
                        bias_of=entry.name,
                        shares=shared_by_bias(Layout.of(site)),
                        sources=entry.sources,
                        modules=entry.modules,
                    )
                )
        for index, decline in step.declines.items():
            sources = (decline.source,) if decline.source else ()
            self._merge(Entry(names[index], step.parameters[index].shape, declined=decline, sources=sources))

    def _site_entry(self, site: Site, name: str) -> Entry:
        layout = Layout.of(site)
        state = layout.fresh_state(torch.device("meta"))
        nodes = [tap.node for tap in site.taps]
        return Entry(
            name,
            site.parameter.shape,
            "+".join(dict.fromkeys(tap.op for tap in site.taps)) + (" of f(W)" if site.parametrized else ""),
            len(site.taps),
            {key: tuple(t.shape) for key, t in state.items()},
            sum(t.numel() * t.element_size() for t in state.values()),
            layout.statistics_size * len(site.kinds),
            sources=tuple(filter(None, dict.fromkeys(map(source_line, nodes)))),
            modules=tuple(filter(None, dict.fromkeys(map(module_path, nodes)))),
            work=Work.of(site),
            rule=site.rule,
        )

    def decline(self, name: str, decline: Decline) -> None:
        known = self._entries[name]
        self._merge(Entry(name, known.shape, declined=decline, sources=known.sources))

    def _merge(self, entry: Entry) -> None:
        known = self._entries.get(entry.name)
        if known is None or known.declined is UNSEEN or (entry.declined is not None and known.declined is None):
            self._entries[entry.name] = entry

    def __iter__(self) -> Iterator[Entry]:
        """Those that are trained now: others that were when they were captured have been frozen."""
        model = self._model()
        frozen = set() if model is None else {name for name, p in model.named_parameters() if not p.requires_grad}
        return (entry for name, entry in self._entries.items() if name not in frozen)

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
        return share_of(list(self))

    @property
    def coverage(self) -> Fractions:
        """Covered fractions, of all trainable parameters and of those that are matrices."""
        return Fractions(*self.share(), *share_of([entry for entry in self if entry.matrix]))

    def sent(self, *entries: Entry) -> int:
        """Numbers of statistics that cross the network for these at a refresh."""
        return 0 if self.local else sum(entry.sent for entry in entries)

    def costs(self, name: str) -> Costs | None:
        """What refreshing and preconditioning the weight ``name`` costs; None for a bias and for what is declined."""
        entry = self[name]
        return None if entry.work is None else count_costs(entry.work)

    def assert_full(self, allow: Sequence[str] = ()) -> None:
        """Hold a model to full coverage, in its own tests: every matrix parameter is preconditioned.

        Args:
            allow: glob patterns of parameter names that may be left out. Each has to be needed.

        Raises:
            AssertionError: names every uncovered matrix parameter with its reason and source line, or every pattern that
                no uncovered matrix parameter needs.
        """
        patterns = (allow,) if isinstance(allow, str) else tuple(allow)
        gaps = [entry for entry in self.declined if entry.matrix]
        idle = [p for p in patterns if not any(fnmatchcase(entry.name, p) for entry in gaps)]
        gaps = [entry for entry in gaps if not any(fnmatchcase(entry.name, p) for p in patterns)]
        total = sum(entry.matrix for entry in self)
        lines = [f"{len(gaps)} of {total} matrix parameters are not preconditioned:"] if gaps else []
        lines += [f"  {entry.name} {times(entry.shape)}: {entry.declined}" for entry in gaps]
        lines += [f"allow pattern {p!r} matches no uncovered matrix parameter: remove it" for p in idle]
        if lines:
            raise AssertionError("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        return {
            "coverage": self.coverage._asdict(),
            "state_bytes": sum(e.state_bytes for e in self),
            "sent": self.sent(*self),
            "switch": None if self.switch is None else str(self.switch),
            "parameters": [self._entry_dict(entry) for entry in self],
        }

    def _entry_dict(self, entry: Entry) -> dict[str, Any]:
        costs = self.costs(entry.name)
        plain = {key: value for key, value in vars(entry).items() if key not in ("work", "shares", "rule")}
        plain["sent"], plain["owner"] = self.sent(entry), self.owners.get(entry.bias_of or entry.name)
        plain["declined"] = entry.declined and asdict(entry.declined)
        own = {"elements": entry.elements, "matrix": entry.matrix, "note": entry.note}
        own["trained_by"] = self.trainers.get(entry.name)
        own["refresh_phase"] = None if self.rotation is None else self.rotation.phase.get(entry.name)
        return {**plain, **own, "costs": costs and asdict(costs)}

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One page, for any browser and without a network: this table, the stages of every program and their diffs."""
        self.graphs.to_html(path)

    def cost_of_base(self, refresh_every: int) -> float:
        """Flops of a step without the rules over those with them, of the weights whose rows are known; 1 if none are."""
        counted = [costs for e in self if (costs := self.costs(e.name)) is not None and costs.layer_flops is not None]
        plain = sum(costs.layer_flops for costs in counted if costs.layer_flops is not None)
        added = sum(costs.refresh_flops / refresh_every + costs.precondition_flops for costs in counted)
        return plain / (plain + added) if plain else 1.0

    def table(self, costs: bool = False) -> str:
        """The table that is printed; with ``costs`` what each weight costs instead."""
        if not costs:
            return str(self)
        return cost_table({e.name: counted for e in self if (counted := self.costs(e.name)) is not None})

    def _placement(self) -> str:
        """A line for each rank, or column of ranks, that owns weights."""
        held: dict[int, list[str]] = {}
        for name, owner in self.owners.items():
            if owner is not None:
                held.setdefault(owner, []).append(name)
        how = "\nstatistics are those of the owner's rows alone" if self.local and held else ""
        return how + "".join(f"\n  owner {rank}: {some(held[rank])}" for rank in sorted(held))

    def __str__(self) -> str:
        rows = []
        for e in self:
            numbers = [e.uses or "", *(f"{number:,}" if number else "" for number in (e.state_bytes, self.sent(e)))]
            op = "declined" if e.declined is not None else e.op
            trainer = [self.trainers.get(e.name, "nobody: no optimizer holds it")] if self.trainers else []
            rows.append([e.name, times(e.shape) or "scalar", op, *numbers, *trainer, e.note])
        trainers = ["trained by"] if self.trainers else []
        headers = ["parameter", "shape", "op", "uses", "state bytes", "sent", *trainers, "factors, or why not"]
        matrices = [e for e in self if e.matrix]
        return (
            aligned(rows, headers, "lllrrrl" + "l" * len(trainers))
            + f"\n{len(self.covered)} of {len([*self])} trainable parameters preconditioned, "
            f"{sum(e.declined is None for e in matrices)} of {len(matrices)} matrices, "
            f"{self.share()[1]:.1%} of all elements;\n"
            f"state {sum(e.state_bytes for e in self):,} bytes, {self.sent(*self):,} "
            "numbers of statistics a refresh" + self._placement() + ("" if self.rotation is None else self.rotation.table())
            + (f"\nnow {self.switch}" if self.switch is not None else "")
        )
