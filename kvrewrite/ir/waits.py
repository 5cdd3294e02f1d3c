"""Says on stderr what one waits for, once a wait is longer than two seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 2.0  # seconds without a word
_quiet = threading.local()


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """While open, something goes on that may take long. After `PATIENCE` a line on stderr says what, and at the end how long it
    took. KVREWRITE_QUIET=1 in the environment turns that off."""
    stream = sys.stderr  # a trace puts another one there
    if stream is None or getattr(_quiet, "on", False) or os.environ.get("KVREWRITE_QUIET", "0") == "1":
        yield
        return
    begun, said = time.monotonic(), threading.Event()

    def say() -> None:
        said.set()
        print(f"kvrewrite: {what} ...", file=stream, flush=True)

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            print(f"kvrewrite: {what}: {time.monotonic() - begun:.1f} s", file=stream, flush=True)


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """While open, nothing is said of this thread's waits: somebody else shows them."""
    before, _quiet.on = getattr(_quiet, "on", False), True
    try:
        yield
    finally:
        _quiet.on = before
