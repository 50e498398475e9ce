"""The classes that recipes name."""

from __future__ import annotations

import importlib
import inspect

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lit_unlearn import callbacks, data, emoji, methods
from lit_unlearn.core import refined_null_space as refined_null_space  # its solver is found by its name
from lit_unlearn.core.solvers import Solver
from lit_unlearn.system.classes import modules_of
from lit_unlearn.training.advice import keep_advice_quiet


def known_classes() -> dict[str, type]:
    """Classes that a recipe may name without their module, by name."""
    found: dict[str, type] = {}
    bases: list[type] = [L.LightningModule, L.LightningDataModule, Callback, Logger, Solver]
    while bases:
        cls = bases.pop()
        bases += cls.__subclasses__()
        if not inspect.isabstract(cls):
            found[cls.__name__] = cls
    return found


def prepare() -> None:
    """Keep Lightning's advice from the terminal and import what recipes may name; short names need that."""
    keep_advice_quiet()
    for package in (methods, callbacks, data, emoji):
        modules_of(package)


def class_of(class_path: str) -> type:
    """The class with the full name ``class_path``."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
