from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from lit_unlearn.callbacks.preemption import SaveOnSignal
from lit_unlearn.system.signals import default_signals, note_signal, take_signal

NAME = "SIGUSR2" if hasattr(signal, "SIGUSR2") else "SIGBREAK"
"""A signal that this system has and that no other test sends."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    number = getattr(signal, NAME)
    before = signal.getsignal(number)
    yield
    signal.signal(number, before)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signals of Windows."""
    for name in ("SIGUSR1", "SIGUSR2"):
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGTERM, raising=False)


def test_a_signal_is_noted_once_and_does_not_end_the_process() -> None:
    note_signal(NAME)
    assert not take_signal(NAME)
    signal.raise_signal(getattr(signal, NAME))
    assert take_signal(NAME)
    assert not take_signal(NAME)


def test_what_is_no_signal() -> None:
    for name in ("SIGFOO", "SIG_DFL", "raise_signal"):
        with pytest.raises(ValueError, match=f"'{name}' is not a signal of this system"):
            note_signal(name)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a signal of POSIX")
def test_a_signal_that_no_process_survives() -> None:
    with pytest.raises(ValueError, match=r"^signals: 'SIGKILL' cannot be handled: give SIGUSR1, SIGUSR2 or SIGTERM"):
        note_signal("SIGKILL")


def test_a_system_without_the_signals_of_posix(windows: None) -> None:
    assert default_signals() == []
    callback = SaveOnSignal()
    assert callback.signals == []
    assert not callback._taken()
    with pytest.raises(ValueError, match="'SIGUSR1' is not a signal of this system: give SIGBREAK or SIGTERM"):
        SaveOnSignal(["SIGUSR1"])
