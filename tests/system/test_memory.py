from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest

from lit_unlearn.system.memory import peak_memory


def test_the_peak_is_in_bytes_and_stays_when_memory_is_freed() -> None:
    before = peak_memory()
    assert 0.9 * psutil.Process().memory_info().rss < before  # Linux brings its counts up to date now and then
    size = before + 50_000_000  # more than there can be free within the process
    assert len(bytearray(b"x") * size) == size
    assert 0.9 * size < peak_memory() < 10 * size


def test_windows_has_no_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(rss=5, peak_wset=7)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: usage))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 7
