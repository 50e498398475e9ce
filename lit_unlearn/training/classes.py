"""The classes that recipes can name."""

from __future__ import annotations

import importlib
import inspect

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.enums import StrEnum

from lit_unlearn import callbacks, data, emoji, methods
from lit_unlearn.core import null_space_solver as null_space_solver  # imported so that recipes find their solvers
from lit_unlearn.core import refined_null_space as refined_null_space
from lit_unlearn.core.solvers import Solver
from lit_unlearn.system.classes import modules_of
from lit_unlearn.system.errors import options
from lit_unlearn.training.advice import keep_advice_quiet


def known_classes() -> dict[str, type]:
    """Classes that a recipe may name without their module, as a mapping from name to class."""
    found: dict[str, type] = {}
    bases: list[type] = [L.LightningModule, L.LightningDataModule, Callback, Logger, Solver]
    bases += [torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
    while bases:
        cls = bases.pop()
        bases += cls.__subclasses__()
        if not inspect.isabstract(cls):
            found[cls.__name__] = cls
    return found


def known_keys() -> list[str]:
    """Keys of our methods, data and solvers, which come in addition to the trainer's: ``model.eta``, ``data.steps``."""
    kinds = {"model": L.LightningModule, "data": L.LightningDataModule, "edit": Solver}
    found = set()
    for cls in known_classes().values():
        if cls.__module__.startswith(("lit_unlearn.methods.", "lit_unlearn.data.", "lit_unlearn.core.")):
            found |= {f"{key}.{name}" for key, kind in kinds.items() if issubclass(cls, kind) for name in options(cls)}
    return sorted(found)


def prepare() -> None:
    """Hide Lightning's advice, and import all classes that recipes may name, since short names need that."""
    keep_advice_quiet()
    # Some defaults of Lightning, e.g. of its Timer, are members of an enumeration, which plain YAML cannot write.
    yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, member: dumper.represent_str(member.value))
    for package in (methods, callbacks, data, emoji):
        modules_of(package)


def class_of(class_path: str) -> type:
    """The class with the full name ``class_path``."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
