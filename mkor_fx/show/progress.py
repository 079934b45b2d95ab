"""A live line about a training loop: steps, loss, factors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


def progress(
    batches: Iterable[T], step: Any, *, total: int | None = None, every: float = 1.0, file: TextIO | None = None
) -> Iterator[T]:
    """Iterate over ``batches`` and keep one line about ``step`` up to date: ``for batch in progress(loader, step): ...``

    The line is drawn over itself on a terminal, and written anew elsewhere. Metrics are read, and the device waited for,
    when it is drawn: at most once in ``every`` seconds, and once at the end.

    Args:
        batches: anything to iterate over.
        step: a compiled step, a compiled model, or anything else with ``metrics() -> dict[str, float]``.
        total: number of batches, where ``len(batches)`` cannot tell.
        every: seconds between two drawings.
        file: where to write; standard error by default.

    Raises:
        ValueError: ``step`` has no metrics.
    """
    source = step if hasattr(step, "metrics") else getattr(step, "mkor", None)
    if not hasattr(source, "metrics"):
        raise ValueError(f"progress needs a compiled step or model, not a {type(step).__name__}")
    if total is None and isinstance(batches, Sized):
        total = len(batches)
    return _draw(batches, source, total, every, file or sys.stderr)


def _draw(batches: Iterable[T], source: Any, total: int | None, every: float, out: TextIO) -> Iterator[T]:
    live, width, started = out.isatty(), 0, time.monotonic()
    drawn = started
    done = 0

    def line(end: str) -> None:
        nonlocal width
        text = _line(done, total, time.monotonic() - started, source.metrics())
        out.write(f"\r{text:<{width}}{end}" if live else f"{text}\n")
        out.flush()
        width = len(text)

    try:
        for batch in batches:
            yield batch
            done += 1
            if time.monotonic() - drawn >= every:
                line("")
                drawn = time.monotonic()
    finally:
        if done:
            line("\n")


def _line(done: int, total: int | None, seconds: float, metrics: dict[str, float]) -> str:
    parts = [f"{done:,}" if total is None else f"{done:,}/{total:,} ({done / max(total, 1):.0%})"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4g}")
    if "refreshes" in metrics:
        parts.append(f"{metrics['refreshes']:,.0f} refreshes")
    if "second_order" in metrics:
        parts.append("second order" if metrics["second_order"] else "first order")
    if metrics.get("skipped"):
        parts.append(f"{metrics['skipped']:,.0f} skipped")
    if "factor_min" in metrics:
        parts.append(f"factors {metrics['factor_min']:.2g} to {metrics['factor_max']:.2g}")
    parts.append(f"{done / max(seconds, 1e-9):.3g} steps/s")
    return "  ".join(parts)
