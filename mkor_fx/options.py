"""Options of the two doors, validated before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

from .passes.order.collectives import Sizes
from .passes.order.compression import Compression
from .passes.pipeline import check_left_out
from .passes.torch_api.backend import BACKENDS, Compiler, inductor_options
from .rules import MKOR, Hybrid, RuleChoice, Rules
from .runtime.speeds import Speeds


@dataclass(frozen=True, kw_only=True)
class Communication:
    """How ranks combine their work.

    Args:
        statistics_bytes, gradient_bytes: a bucket that holds as much is sent.
        statistics_dtype: dtype in which statistics travel; None is that in which they are summed (float32). Counts and
            noise levels keep theirs.
        average: ``"ranks"``: every rank's loss weighs the same, as under DistributedDataParallel. ``"rows"``: each weighs
            as its number of rows, the first dimension of the step's last tensor argument: equal to one process also where
            batches differ in size.
        padding: with owners, how many bytes of gradients may be padding, as a part of all gradients of preconditioned
            weights. A weight that would need more (one that is larger than a rank's share) stays on every rank.
        speeds: measured ones of ranks and network. Then statistics travel together where that is cheaper by them than a
            start-up each (``statistics_bytes`` is of no meaning), and what costs less to derive than to broadcast is derived
            on every rank, the rest where the least time is spent on it (SPD-KFAC, Shi, Zhang and Li, 2021, arXiv
            2107.06533).
        compress: with owners, how their directions travel: in few bits, with a bound on each element's error. None: as they
            are.
        check_replicas_every: steps between checks that parameters, buffers, factors and optimizer state are bitwise equal
            on all ranks; 0 is never.

    Raises:
        ValueError: for an option outside its range, naming it.
    """

    statistics_bytes: int = 128 << 10
    gradient_bytes: int = 25 << 20
    statistics_dtype: torch.dtype | None = None
    average: Literal["ranks", "rows"] = "ranks"
    padding: float = 0.15
    speeds: Speeds | None = None
    compress: Compression | None = None
    check_replicas_every: int = 0
    sizes: Sizes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("statistics_bytes", 1), ("gradient_bytes", 1), ("check_replicas_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Communication({name}={value!r}): must be an integer of at least {least}")
        if not isinstance(self.padding, (int, float)) or not self.padding >= 0:
            raise ValueError(f"Communication(padding={self.padding!r}): must be a number, at least 0")
        if self.average not in ("ranks", "rows"):
            raise ValueError(f"Communication(average={self.average!r}): must be 'ranks' or 'rows'")
        if self.statistics_dtype is not None and not self.statistics_dtype.is_floating_point:
            raise ValueError(f"Communication(statistics_dtype={self.statistics_dtype}): must be a floating-point dtype")
        if self.speeds is not None and not isinstance(self.speeds, Speeds):
            raise ValueError(f"Communication(speeds={self.speeds!r}): must be a mkor_fx.Speeds, or None")
        if self.speeds is not None and "statistics_bytes" in self.changed():
            raise ValueError("Communication(statistics_bytes, speeds): speeds decide what travels together: give one")
        if self.compress is not None and not isinstance(self.compress, Compression):
            raise ValueError(f"Communication(compress={self.compress!r}): must be a mkor_fx.Compression, or None")
        sizes = Sizes(self.statistics_bytes, self.gradient_bytes, self.statistics_dtype, self.speeds, self.compress)
        object.__setattr__(self, "sizes", sizes)

    def changed(self) -> list[str]:
        """The options that differ from their defaults."""
        fields = [f for f in dataclasses.fields(self) if f.init]
        return [f.name for f in fields if getattr(self, f.name) != f.default]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the doors take beside model, loss and optimizer, under the names of their keywords.

    ``without`` names passes that are left out of the programs: for tests and benchmarks of what a pass is worth.
    """

    rule: RuleChoice = MKOR()  # noqa: RUF009  (frozen)
    refresh_every: int = 1
    refresh_phases: int = 1
    derive: str = "together"
    skip: Sequence[str] = ()
    precondition: str = "step"
    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    skip_nonfinite: bool = True
    process_group: ProcessGroup | None = None
    placement: str | float = "replicated"
    stale: int = 0
    communication: Communication = Communication()
    return_outputs: bool = False
    backend: str = "inductor"
    dynamic: bool | None = None
    fullgraph: bool = False
    mode: str | None = None
    options: dict[str, Any] | None = None
    without: Sequence[str] = ()
    rules: Rules = field(init=False)
    hybrid: Hybrid | None = field(init=False)
    compiler: Compiler = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.refresh_every, int) or isinstance(self.refresh_every, bool) or self.refresh_every < 1:
            raise ValueError(
                f"refresh_every={self.refresh_every!r}: must be an integer of at least 1, steps per refresh"
            )
        phases = self.refresh_phases
        if not isinstance(phases, int) or isinstance(phases, bool) or not 1 <= phases <= self.refresh_every:
            raise ValueError(
                f"refresh_phases={phases!r}: must be an integer from 1 (all weights refresh at once) to refresh_every="
                f"{self.refresh_every} (a part of them at each step)"
            )
        if phases > 1 and self.stale:
            raise ValueError(
                f"refresh_phases={phases} with stale=1: statistics of all weights travel together to the next step. Leave "
                "one of the two out"
            )
        if self.derive not in ("together", "spread"):
            raise ValueError(
                f"derive={self.derive!r}: must be 'together' (at the first step of each window) or 'spread' (over its steps)"
            )
        if self.precondition not in ("step", "backward"):
            raise ValueError(f"precondition={self.precondition!r}: must be 'step' or 'backward'")
        share = isinstance(self.placement, int | float) and not isinstance(self.placement, bool) and 0 < self.placement <= 1
        if not share and self.placement not in ("replicated", "owner", "local"):
            raise ValueError(
                f"placement={self.placement!r}: must be 'replicated', 'owner', 'local', or the share of ranks that keep "
                "each weight's factors, in (0, 1], e.g. 0.5"
            )
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate!r}: must be an integer of at least 1, parts of a batch")
        if self.accumulate > 1 and (self.return_outputs or self.stale):
            other = "return_outputs=True" if self.return_outputs else "stale=1"
            raise ValueError(f"accumulate={self.accumulate} runs a batch in parts, which cannot have {other}: leave one out")
        clip = self.clip_norm
        if clip is not None and (not isinstance(clip, int | float) or isinstance(clip, bool) or not clip > 0):
            raise ValueError(f"clip_norm={clip!r}: must be positive, the largest norm of all gradients together, or None")
        ema = self.ema
        if ema is not None and (not isinstance(ema, int | float) or isinstance(ema, bool) or not 0 <= ema < 1):
            raise ValueError(f"ema={ema!r}: must be in [0, 1), how much of an average a step keeps, e.g. 0.999, or None")
        if self.stale not in (0, 1):
            raise ValueError(
                f"stale={self.stale!r}: must be 0 (statistics refresh in their own step) or 1 (in the next)"
            )
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend={self.backend!r}: must be one of {', '.join(BACKENDS)} ('eager' runs the rewritten "
                "graph without compiling it)"
            )
        if not isinstance(self.communication, Communication):
            raise ValueError(f"communication={self.communication!r}: must be a mkor_fx.Communication")
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        odd = [pattern for pattern in skip if not isinstance(pattern, str)]
        if odd:
            raise ValueError(f"skip={[*skip]!r}: {odd[0]!r} is no pattern of parameter names, such as 'head.*'")
        if self.mode is not None and self.options is not None:
            raise ValueError("give either mode or options, as with torch.compile")
        compiler = Compiler(self.backend, inductor_options(self.mode, self.options))
        if self.backend == "eager" and compiler.options:
            raise ValueError("backend='eager' compiles nothing, so mode and options would do nothing: leave them out")
        check_left_out(self.without)
        object.__setattr__(self, "skip", skip)
        object.__setattr__(self, "compiler", compiler)
        object.__setattr__(self, "rules", Rules.of(self.rule))
        object.__setattr__(self, "hybrid", self.rule if isinstance(self.rule, Hybrid) else None)

    @property
    def about(self) -> str:
        """What all ranks must have alike, and what programs depend on."""
        names = ("refresh_every", "refresh_phases", "derive", "skip", "backend", "without", "accumulate", "clip_norm", "ema",
                 "skip_nonfinite", "placement", "stale", "communication")  # fmt: skip
        hybrid = "" if self.hybrid is None else f", hybrid {self.hybrid.about}"
        return ", ".join(f"{name} {getattr(self, name)}" for name in names) + hybrid
