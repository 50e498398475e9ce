"""The classes that recipes can name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib import import_module

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.enums import StrEnum

from lit_unlearn import callbacks, data, emoji, methods
from lit_unlearn.core.solvers import Solver
from lit_unlearn.system.classes import modules_of
from lit_unlearn.system.errors import options
from lit_unlearn.system.sources import our_classes
from lit_unlearn.training.advice import keep_advice_quiet
from lit_unlearn.training.early import Asked


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


def prepare(args: Sequence[str] | None = None) -> None:
    """Hide the libraries' advice, and import the classes that a command names, since short names need that.

    Args:
        args: A command of the trainer and its options; recipes as paths. By default all classes are imported.
    """
    keep_advice_quiet()
    # Some defaults of Lightning, e.g. of its Timer, are members of an enumeration, which plain YAML cannot write.
    yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, member: dumper.represent_str(member.value))
    if args is None or any(arg in ("-h", "--help") or arg.endswith(".help") for arg in args):
        import_all()
        return
    import_named(*args, *(path.read_text(encoding="utf-8") for path in Asked.of(args[1:]).recipes))


def import_named(*texts: str) -> None:
    """Import the modules of this package that declare a class whose name occurs in one of ``texts``."""
    known = our_classes()
    for name in sorted({word for text in texts for word in re.findall(r"\w+", text)}):
        if name in known:
            import_module(known[name].module)


def import_all() -> None:
    """Import all classes that recipes may name; this takes seconds, and suggestions for a wrong name need it."""
    for package in (methods, callbacks, data, emoji):
        modules_of(package)
    for name in ("null_space_solver", "refined_null_space"):
        import_module(f"lit_unlearn.core.{name}")


def class_of(class_path: str) -> type:
    """The class with the full name ``class_path``."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
