"""What a long wait is for, in a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

BEFORE_IT_SHOWS, BETWEEN = 2.0, 1.0  # seconds


@contextlib.contextmanager
def shown(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Say on standard error, where it is a terminal, that ``what`` goes on and for how long; the line is gone in the end."""
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty():
        yield
        return
    began, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        if ended.wait(BEFORE_IT_SHOWS):
            return
        while True:
            stream.write(f"\r\x1b[Kmkor_fx: {what}, {time.monotonic() - began:.0f} s")
            stream.flush()
            if ended.wait(BETWEEN):
                break
        stream.write("\r\x1b[K")
        stream.flush()

    teller = threading.Thread(target=tell, name="mkor_fx waiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
