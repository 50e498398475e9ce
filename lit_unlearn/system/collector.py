"""Python's garbage collector while a command starts and ends.

The collector walks all objects that can form cycles, again and again while their number grows. The libraries of a fit
are 4,000 modules, of which nothing is garbage: a quarter of the time of their imports went into these walks, and a
second more into a last one when the process ended.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = (100_000, 50, 100)
"""Thresholds of the three generations while a command starts; by default the first is 700 (2,000 from Python 3.13)."""

_usual: list[tuple[int, int, int]] = []


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Collect rarely within, until ``collect_as_usual`` is called, and not once more when the process ends."""
    _usual.append(gc.get_threshold())
    gc.set_threshold(*RARELY)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*_usual.pop())


def collect_as_usual() -> None:
    """The imports are over: collect as often as before ``collecting_rarely``; without it, nothing changes."""
    if _usual:
        gc.set_threshold(*_usual[-1])
