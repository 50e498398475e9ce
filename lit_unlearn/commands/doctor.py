"""``lit-unlearn doctor``: what is installed, on which device commands run, and where caches lie."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lit_unlearn import __version__
from lit_unlearn.commands.parser import Parser, command_parser

DESCRIPTION = "say what is installed, the device, the extras and the caches"
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "jsonargparse", "tensorboard")
EXTRAS = {
    "llava": ("accelerate", "bitsandbytes"),
    "nudenet": ("nudenet",),
    "fid": ("torch_fidelity",),
    "completion": ("shtab",),
    "app": ("gradio",),
}
"""Modules that each extra of the package brings."""


def parser() -> Parser:
    """Options of ``doctor``."""
    return command_parser("doctor", DESCRIPTION)


def run(options: argparse.Namespace) -> int:
    """Print what is installed and found.

    Returns:
        1 if a package that is needed is missing, else 0.
    """
    print(f"lit-unlearn   {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    missing = []
    for name in PACKAGES:
        try:
            print(f"{name:14}{version(name)}")
        except PackageNotFoundError:
            missing.append(name)
            print(f"{name:14}missing: pip install {name}")
    print(f"device        {_device()}")
    for name, modules in EXTRAS.items():
        lacks = [module for module in modules if find_spec(module) is None]
        print(f"extra         {name}: {'installed' if not lacks else f'pip install lit-unlearn[{name}]'}")
    for what, folder in _caches().items():
        print(f"{what:14}{folder}{'' if folder.is_dir() else ' (does not exist yet)'}")
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    if offline:
        print(f"offline       nothing is downloaded: {', '.join(offline)}")
    free = shutil.disk_usage(".").free / 2**30
    print(f"disk          {free:.0f} GiB free here")
    return int(bool(missing))


def _device() -> str:
    if find_spec("torch") is None:
        return "unknown: PyTorch is missing"
    import torch

    from lit_unlearn.system.devices import device_name, find_device

    device = find_device(None)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device_name(device)}{threads}"


def _caches() -> dict[str, Path]:
    from huggingface_hub import constants

    return {"hub cache": Path(constants.HF_HUB_CACHE), "runs": Path("logs").absolute()}
