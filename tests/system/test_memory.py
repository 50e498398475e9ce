from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lit_unlearn.system import memory
from lit_unlearn.system.memory import peak_memory


@pytest.fixture(params=["as it is", "without /proc"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if request.param == "without /proc":
        monkeypatch.setattr(memory, "STATUS", tmp_path / "status")


def test_the_peak_is_in_bytes_and_stays_when_memory_is_freed(system: None) -> None:
    before = peak_memory()
    assert 0.9 * psutil.Process().memory_info().rss < before  # Linux brings its counts up to date now and then
    size = before + 50_000_000  # more than there can be free within the process
    assert len(bytearray(b"x") * size) == size
    assert 0.9 * size < peak_memory() < 10 * size


def test_windows_has_neither_proc_nor_the_module_resource(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(rss=5, peak_wset=7)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: usage))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 7
