"""How fast ranks and their network are, and what follows from it for inversions (SPD-KFAC, Shi, Zhang and Li, 2021,
arXiv 2107.06533)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .balance import deal


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Straight lines through what was measured on one cluster: of messages by their bytes, of inversions by their flops.

    Args:
        latency: seconds that an all-reduce of nothing takes, at least 0.
        bandwidth: bytes of an all-reduce that each further second takes; ``math.inf`` where size costs nothing.
        flops: products that a rank computes a second, in flop/s: how long after one factor's statistics the next one's are
            there.
        broadcast_latency, broadcast_bandwidth: the same of a broadcast; None: as an all-reduce.
        inversion_latency: seconds of the smallest inversion or decomposition, at least 0.
        inversion_flops: a matrix of ``d`` rows takes ``d^3 / inversion_flops`` seconds more; None: ``flops``.

    Raises:
        ValueError: for a number outside its range, naming it.
    """

    latency: float
    bandwidth: float
    flops: float
    broadcast_latency: float | None = None
    broadcast_bandwidth: float | None = None
    inversion_latency: float = 0.0
    inversion_flops: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name in ("broadcast_latency", "broadcast_bandwidth", "inversion_flops"):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
            least = "at least 0 and finite, seconds" if name.endswith("latency") else "positive"
            fits = is_number and (0 <= value < math.inf if name.endswith("latency") else value > 0)
            if not fits:
                raise ValueError(f"Speeds({name}={value!r}): must be {least}")

    def all_reduce(self, size: float) -> float:
        """Seconds of an all-reduce of ``size`` bytes: ``latency + size / bandwidth``."""
        return self.latency + size / self.bandwidth

    def broadcast(self, size: float) -> float:
        """Seconds of a broadcast of ``size`` bytes."""
        latency = self.latency if self.broadcast_latency is None else self.broadcast_latency
        return latency + size / (self.bandwidth if self.broadcast_bandwidth is None else self.broadcast_bandwidth)

    def inversion(self, rows: int) -> float:
        """Seconds that a rank takes to invert or decompose a matrix of so many ``rows``."""
        return self.inversion_latency + rows**3 / (self.flops if self.inversion_flops is None else self.inversion_flops)

    @staticmethod
    def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
        """``(latency, bandwidth)`` of the least squares line through measured times: what to pass of a benchmark.

        Raises:
            ValueError: fewer than two different sizes, or times that do not grow with them.
        """
        if len(sizes) != len(seconds) or len({*sizes}) < 2:
            raise ValueError(f"Speeds.line: needs times of at least two sizes, got {len(sizes)} and {len(seconds)}")
        size, time = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        slope = sum((x - size) * (y - time) for x, y in zip(sizes, seconds)) / sum((x - size) ** 2 for x in sizes)
        if not slope > 0:
            raise ValueError(f"Speeds.line: times {[*seconds]} do not grow with sizes {[*sizes]}: measure larger ones")
        return max(0.0, time - slope * size), 1 / slope


class DerivedSizes(NamedTuple):
    """What is derived of one weight's state: the rows of each matrix that is inverted or decomposed, and the bytes of each
    tensor that it makes."""

    matrices: tuple[int, ...]
    bytes: tuple[int, ...]


def workers(weights: Mapping[str, DerivedSizes], size: int, speeds: Speeds | None = None) -> dict[str, int | None]:
    """The rank among ``size`` that derives each weight's and broadcasts it; None: every rank does, and nothing is sent.

    Longest processing time first: the costliest to the rank with the least work so far. ``speeds`` None: a matrix of
    ``d`` rows costs ``d^3``, and all is shared; else its seconds, and a weight that takes less time to derive than to
    broadcast is derived on every rank. Load is counted time, where the released code adds up dimensions.
    """
    if size == 1:
        return dict.fromkeys(weights)
    cost = (lambda rows: float(rows**3)) if speeds is None else speeds.inversion
    work = {name: sum(map(cost, one.matrices)) for name, one in weights.items()}
    dear = lambda name: speeds is not None and work[name] < sum(map(speeds.broadcast, weights[name].bytes))
    dealt = deal({name: work[name] for name in weights if not dear(name)}, [0.0] * size)
    return {**dealt, **{name: None for name in weights if name not in dealt}}
