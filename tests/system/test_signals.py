from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lit_unlearn.system.signals import note_signal, take_signal


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


def test_a_signal_is_noted_once_and_does_not_end_the_process() -> None:
    note_signal("SIGUSR2")
    assert not take_signal("SIGUSR2")
    os.kill(os.getpid(), signal.SIGUSR2)
    assert take_signal("SIGUSR2")
    assert not take_signal("SIGUSR2")


def test_what_is_no_signal() -> None:
    for name in ("SIGFOO", "SIG_DFL", "raise_signal"):
        with pytest.raises(ValueError, match=f"'{name}' is no signal of this system"):
            note_signal(name)
