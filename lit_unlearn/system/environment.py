"""What the libraries read, or say, when they are imported."""

from __future__ import annotations

import os
import sys
import warnings


def prepare_libraries() -> None:
    """Set what they would otherwise do in our way; variables that are set stay as they are. Before their import."""
    # Keep the advice that transformers and diffusers give on import from the terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Operations that PyTorch does not have for Apple's GPU yet run on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if "ipykernel" in sys.modules:  # there tqdm warns on import if ipywidgets is missing; its bars are text then
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tqdm.auto  # noqa: F401
