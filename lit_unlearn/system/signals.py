"""Signals that are noted when they come and acted on later; nothing heavy is imported, so it can be done at once."""

from __future__ import annotations

import signal
from typing import Any

_received: set[int] = set()


class Preempted(Exception):
    """A run was told to stop, and what it had was saved."""


def _note(signum: int, frame: Any) -> None:
    _received.add(signum)


def default_signals() -> list[str]:
    """Signals that a run waits for unless told otherwise; none on Windows, which has neither ``SIGUSR1`` nor SLURM."""
    return [name for name in ("SIGUSR1",) if hasattr(signal, name)]


def note_signal(name: str) -> None:
    """Note the signal ``name`` (``SIGUSR1``) from now on instead of ending the process.

    Lightning, which would save a checkpoint within its own handler, leaves alone a signal that has a handler already.

    Raises:
        ValueError: This system has no such signal, or ends a process by it at once.
    """
    number = getattr(signal, name, None)
    if not isinstance(number, signal.Signals):
        raise ValueError(f"signals: {name!r} is no signal of this system: give {_choice()}.")
    if signal.getsignal(number) is not _note:
        try:
            signal.signal(number, _note)
        except OSError as error:
            raise ValueError(f"signals: {name!r} cannot be waited for: give {_choice()}.") from error


def _choice() -> str:
    """Those of the usual signals that this system has, as in ``SIGUSR1, SIGUSR2 or SIGTERM``."""
    *others, last = [name for name in ("SIGUSR1", "SIGUSR2", "SIGBREAK", "SIGTERM") if hasattr(signal, name)]
    return f"{', '.join(others)} or {last}" if others else last


def take_signal(name: str) -> bool:
    """Whether the signal ``name`` has come since it was last asked for."""
    number = int(getattr(signal, name))
    come = number in _received
    _received.discard(number)
    return come
