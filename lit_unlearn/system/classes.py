"""Classes by their names: those of a package by the names that they declare, any other by its import path."""

from __future__ import annotations

import inspect
import pkgutil
import pydoc
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from lit_unlearn.system.errors import closest, essence, parse_error

T = TypeVar("T")

CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""What an import path looks like: ``my_package.MyJudge``."""


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Import all modules that lie directly in ``package``."""
    return [import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]


def declared_classes(package: ModuleType, base: type[T], attribute: str) -> dict[str, type[T]]:
    """The classes of ``package`` that declare a name, by that name.

    Args:
        package: Its modules are imported.
        base: What they are subclasses of.
        attribute: The class attribute that holds the name.
    """
    classes = [
        cls
        for module in modules_of(package)
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == module.__name__
    ]
    return {vars(cls)[attribute]: cls for cls in classes if attribute in vars(cls)}


def class_path(cls: type) -> str:
    """The import path of ``cls``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def import_class(path: str, field: str) -> type:
    """Import the class ``path``; that runs the code of its module.

    Args:
        path: Such as ``my_package.MyJudge``.
        field: What the user gave it for, as messages begin.

    Raises:
        ValueError: It cannot be imported, or is no class.
    """
    try:
        found = pydoc.locate(path)
        module = None if found else pydoc.locate(path.rpartition(".")[0])
    except pydoc.ErrorDuringImport as error:
        reason = f"{error.exc.__name__ if error.exc else 'error'}: {error.value}"
        raise ValueError(f"{field}={path!r} cannot be imported ({essence(ValueError(reason))}): mend that.") from error
    if found is None:
        where, _, name = path.rpartition(".")
        if inspect.ismodule(module):
            classes = [key for key, value in vars(module).items() if isinstance(value, type)]
            raise ValueError(f"{field}={path!r}: {where} has no class {name}{closest(name, classes)}.")
        raise ValueError(
            f"{field}={path!r} cannot be imported: there is no {where}; install it, or add its folder to PYTHONPATH."
        )
    if not isinstance(found, type):
        raise ValueError(f"{field}={path!r} is no class but {type(found).__name__}: give the import path of a class.")
    return found


def checked_arguments(
    cls: type, given: Mapping[str, Any], field: str, owner: str, skip: Collection[str] = ()
) -> dict[str, Any]:
    """``given`` as arguments of ``cls``, each as its annotation says; text is read as on the command line.

    Args:
        cls: The class; nothing of it is called.
        given: Arguments by name.
        field: What they were given as: ``field.name`` is how messages begin.
        owner: What the user calls the class.
        skip: Arguments that are not the user's to give.

    Raises:
        ValueError: An argument is unknown, missing, or of the wrong type.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    known: Sequence[str] = parser.add_class_arguments(cls, skip=set(skip), fail_untyped=False)
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{field}.{unknown[0]} is unknown to {owner}: it has {', '.join(known) or 'none'}.")
    needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.name in known]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{field}.{missing[0]} is missing: {owner} needs it.")
    try:
        parsed = parser.parse_object(dict(given))
    except ArgumentError as error:
        raise ValueError(f"{field}.{parse_error(str(error), {}, known)}") from error
    return {name: parsed[name] for name in given}


def describe(classes: Mapping[str, type], prefix: str | None = None, skip: Collection[str] = ()) -> str:
    """What ``classes`` are and the arguments that they take, for the terminal.

    Args:
        classes: By the names that users give them.
        prefix: What stands before the name of an argument, as in ``--prefix.argument``; None for the class's name.
        skip: Arguments that are not the user's to give.
    """
    from jsonargparse import ArgumentParser

    texts = []
    for name, cls in classes.items():
        parser = ArgumentParser(usage=SUPPRESS, add_help=False)
        parser.add_class_arguments(cls, prefix or name, skip=set(skip), fail_untyped=False, as_group=False)
        what = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        arguments = parser.format_help().partition("\n")[2]
        texts.append(f"{name}: {what}\n{arguments}".replace("``", ""))
    return "\n".join(texts).rstrip()
