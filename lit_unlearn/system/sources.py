"""Classes as their source files declare them, read without importing them: an import of PyTorch takes seconds."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOMS = ("methods", "callbacks", "data", "emoji", "core", "judges", "attacks")
"""Folders of the package with classes that recipes or options name."""
WITHOUT_OPTIONS = {
    "LightningModule",
    "LightningDataModule",
    "Callback",
    "ABC",
    "Generic",
    "Protocol",
    "Module",
    "object",
}
"""Bases whose own arguments are not options of a recipe."""


@dataclass(frozen=True)
class Argument:
    """An argument of a class.

    Attributes:
        name: Its name.
        annotation: Its type as it is written; empty if there is none.
        default: Its default as it is written; None if it must be given.
        help: What the class's docstring says about it.
    """

    name: str
    annotation: str
    default: str | None
    help: str


@dataclass(frozen=True)
class SourceClass:
    """A class as its file declares it.

    Attributes:
        name: Its name.
        module: The module that declares it.
        bases: Names of its bases, without their modules.
        summary: First paragraph of its docstring.
        arguments: Those of its own ``__init__``, by name; of a dataclass, its fields.
        constants: Class attributes that are text, by name.
    """

    name: str
    module: str
    bases: tuple[str, ...]
    summary: str
    arguments: dict[str, Argument] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)


class SourceClasses(Mapping[str, SourceClass]):
    """Classes of files of this package, by name; a file is parsed when one of its classes is asked for.

    A command asks for a few of them, and to parse all 138 files takes a third of a second.

    Args:
        files: The files. If two declare a class of the same name, it is that of the later one.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, list[Path]] = {}
        for file in files:
            # What looks like a class may be a line of a docstring: parsing tells.
            for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
                self._files.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> SourceClass:
        for file in reversed(self._files.get(name, [])):
            if (found := _classes_in(file).get(name)) is not None:
                return found
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._files if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def our_classes(rooms: tuple[str, ...] = ROOMS) -> SourceClasses:
    """The classes of this package that a recipe or an option may name, by name.

    Args:
        rooms: Folders of the package to look in.
    """
    return SourceClasses(file for room in rooms for file in sorted((PACKAGE / room).rglob("*.py")))


@cache
def _classes_in(file: Path) -> dict[str, SourceClass]:
    return {found.name: found for found in _classes(file, _module(file))}


@cache
def trainer_options() -> dict[str, Argument]:
    """The arguments of Lightning's ``Trainer`` by name; empty if its source is not where it usually is."""
    spec = importlib.util.find_spec("lightning")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        file = Path(place, "pytorch", "trainer", "trainer.py")
        if file.is_file():
            return {
                name: argument
                for found in _classes(file, "lightning.pytorch.trainer.trainer")
                if found.name == "Trainer"
                for name, argument in found.arguments.items()
            }
    return {}


def ancestors(name: str) -> list[SourceClass]:
    """The class ``name`` of this package and its bases in this package, nearest first."""
    known, found, left = our_classes(), [], [name]
    while left:
        here = left.pop(0)
        if here in known and known[here] not in found:
            found.append(known[here])
            left += known[here].bases
    return found


def arguments_of(name: str) -> dict[str, Argument] | None:
    """The arguments of the class ``name``, those that it passes on to its bases included.

    None if it is not a class of this package, or has a base elsewhere that may have arguments of its own.
    """
    line = ancestors(name)
    if not line:
        return None
    known = our_classes()
    if any(base not in known and base not in WITHOUT_OPTIONS for cls in line for base in cls.bases):
        return None
    found: dict[str, Argument] = {}
    for cls in line:
        for argument in cls.arguments.values():
            if argument.name not in found or not found[argument.name].help:
                found[argument.name] = argument
    return found


def _module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _classes(file: Path, module: str) -> Iterator[SourceClass]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield _class(node, module)


def _class(node: ast.ClassDef, module: str) -> SourceClass:
    text = ast.get_docstring(node) or ""
    helps = _helps(text)
    arguments: dict[str, Argument] = {}
    constants: dict[str, str] = {}
    is_dataclass = any("dataclass" in ast.unparse(one) for one in node.decorator_list)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            helps |= _helps(ast.get_docstring(item) or "")
            arguments |= {one.name: one for one in _signature(item.args, helps)}
        value = getattr(item, "value", None)
        if isinstance(item, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Constant):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            if isinstance(value.value, str):
                constants |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
        if is_dataclass and isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, default = item.target.id, ast.unparse(value) if value is not None else None
            arguments[name] = Argument(name, ast.unparse(item.annotation), default, helps.get(name, ""))
    bases = tuple(_last_name(base) for base in node.bases)
    return SourceClass(node.name, module, bases, " ".join(text.split("\n\n")[0].split()), arguments, constants)


def _last_name(base: ast.expr) -> str:
    if isinstance(base, ast.Subscript):
        base = base.value
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def _signature(arguments: ast.arguments, helps: dict[str, str]) -> Iterator[Argument]:
    named = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(named) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(named, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for one, default in pairs:
        if one.arg != "self":
            annotation = ast.unparse(one.annotation) if one.annotation is not None else ""
            value = ast.unparse(default) if default is not None else None
            yield Argument(one.arg, annotation, value, helps.get(one.arg, ""))


def _helps(docstring: str) -> dict[str, str]:
    """What ``Args:`` or ``Attributes:`` of a docstring in Google's style says about each name."""
    found: dict[str, str] = {}
    name, inside = "", False
    for line in docstring.splitlines():
        if line.strip() in ("Args:", "Attributes:"):
            inside, name = True, ""
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (start := re.match(r"    (\**\w+)(?: \(.*?\))?: (.*)", line)):
            name = start[1]
            found[name] = start[2].strip()
        elif inside and name and line.strip():
            found[name] += " " + line.strip()
    return {key: text.replace("``", "") for key, text in found.items()}
