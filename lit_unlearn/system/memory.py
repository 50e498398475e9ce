"""How much memory this process has needed."""

from __future__ import annotations

import sys

import psutil


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes, on every system."""
    usage = psutil.Process().memory_info()
    if sys.platform == "win32":
        return usage.peak_wset
    import resource  # psutil knows the peak on Windows only, and Windows does not have this module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others kilobytes
