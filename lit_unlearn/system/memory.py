"""Measures how much memory this process has used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
"""File in which Linux reports the memory of a process."""


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes, on every system.

    psutil supports all systems, but reports the peak only on Windows.
    """
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    counts = STATUS.read_text(encoding="utf-8") if STATUS.is_file() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", counts, flags=re.MULTILINE):
        return int(found[1]) * 1024
    import resource  # Windows does not have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others kilobytes
