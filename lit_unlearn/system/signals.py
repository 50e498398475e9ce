"""Signals are noted when they arrive and handled later; imports are few, so that handlers can be set at the start."""

from __future__ import annotations

import signal
from typing import Any

_received: set[int] = set()


class Preempted(Exception):
    """A run was told to stop, and its progress was saved."""


def _note(signum: int, frame: Any) -> None:
    _received.add(signum)


def default_signals() -> list[str]:
    """Signals that a run waits for by default; none on Windows, which has neither ``SIGUSR1`` nor SLURM."""
    return [name for name in ("SIGUSR1",) if hasattr(signal, name)]


def note_signal(name: str) -> None:
    """From now on, note the signal ``name`` (``SIGUSR1``) instead of ending the process.

    Lightning would save a checkpoint inside its own handler, but it does not replace existing handlers.

    Raises:
        ValueError: This system does not have the signal, or does not allow a handler for it.
    """
    number = getattr(signal, name, None)
    if not isinstance(number, signal.Signals):
        raise ValueError(f"signals: {name!r} is not a signal of this system: give {_choice()}.")
    if signal.getsignal(number) is not _note:
        try:
            signal.signal(number, _note)
        except OSError as error:
            raise ValueError(f"signals: {name!r} cannot be handled: give {_choice()}.") from error


def _choice() -> str:
    """The usual signals that this system has, as in ``SIGUSR1, SIGUSR2 or SIGTERM``."""
    *others, last = [name for name in ("SIGUSR1", "SIGUSR2", "SIGBREAK", "SIGTERM") if hasattr(signal, name)]
    return f"{', '.join(others)} or {last}" if others else last


def take_signal(name: str) -> bool:
    """Whether the signal ``name`` has arrived since the last call."""
    number = int(getattr(signal, name))
    come = number in _received
    _received.discard(number)
    return come
