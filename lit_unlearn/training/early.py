"""Checks of a command line before PyTorch is imported, so that a wrong name is told at once.

Only what is certainly wrong is refused here, with the sentence that the full check would give; the rest is left to the
parser, which knows every class. Classes are read from their source files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.edited import edited_concepts
from lit_unlearn.judges.names import check_short_name
from lit_unlearn.system.errors import UserError, closest, closest_key, user_errors
from lit_unlearn.system.run_file import check_checkpoint
from lit_unlearn.system.sources import ancestors, arguments_of, our_classes, trainer_options
from lit_unlearn.training.arguments import LIGHTNINGS, OF_THE_TRAINER, OPTIONS, SECTIONS
from lit_unlearn.training.recipes import read_list

FREE = {"init_args", "class_path", "dict_kwargs", "help"}
"""Keys of a section that are not arguments of its class."""


@dataclass
class Asked:
    """What a command line asks for, as far as it can be read without its classes.

    Attributes:
        recipes: Files of its recipes.
        content: The recipes' content, merged in their order.
        options: The other options and their values, without dashes and ``init_args``: ``model.eta``.
        names: The options as they were typed.
    """

    recipes: list[Path] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Sequence[str]) -> Asked:
        """Read the arguments of a command whose recipes are paths, as ``resolve_recipes`` returns them."""
        asked, left = cls(), list(args)
        while left:
            arg = left.pop(0)
            if not arg.startswith("-"):
                continue
            name, equals, value = arg.partition("=")
            if not equals and left and not left[0].startswith("--"):
                value = left.pop(0)
            if name in ("--config", "-c"):
                asked.recipes.append(Path(value))
                asked.content = _merged(asked.content, _read(Path(value)))
            elif name.startswith("--"):
                key = name.removeprefix("--").rstrip("+").replace(".init_args.", ".")
                asked.options[key], asked.names[key] = value, name
        return asked

    def kind(self, section: str) -> str | None:
        """Name of the class of a section, such as ``model``, without its module; None if that is not known."""
        given = self.options.get(f"{section}.class_path", self.options.get(section))
        if given is None:
            of_recipe = self.content.get(section)
            given = of_recipe.get("class_path") if isinstance(of_recipe, dict) else of_recipe
        if not isinstance(given, str) or not re.fullmatch(r"[\w.]+", given):
            return None
        name = given.rpartition(".")[2]
        known = our_classes()
        return name if name in known and ("." not in given or given == f"{known[name].module}.{name}") else None

    def value(self, section: str, name: str) -> Any:
        """The value of an argument of a section's class; None if it is not set."""
        if f"{section}.{name}" in self.options:
            return self.options[f"{section}.{name}"]
        return self.init_args(section).get(name)

    def init_args(self, section: str) -> dict[str, Any]:
        """Arguments that the recipes set for a section's class."""
        found = self.content.get(section)
        found = found.get("init_args") if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def concept(self) -> Any:
        """The concept or concepts; None if there are none."""
        given = self.options.get("concept", self.content.get("concept"))
        return read_list("--concept", given) if isinstance(given, str) and given.startswith("[") else given

    def listed(self, name: str) -> list[str]:
        """The values of an option of the command that takes one or a list."""
        given = self.options.get(name)
        if not isinstance(given, str):
            return []
        texts = read_list(f"--{name}", given) if given.startswith("[") else [given]
        return [text for text in texts if text not in ("", "null")]


def check_early(args: Sequence[str]) -> None:
    """Refuse a command line with a name that nothing has: of a method, a key, a concept, a judge or a checkpoint.

    Args:
        args: A command of the trainer and its options; recipes as paths.

    Raises:
        UserError: A name is wrong; the sentence says which, and what comes nearest.
    """
    if any(arg in ("-h", "--help") or arg.endswith(".help") for arg in args):
        return
    command, asked = args[0], Asked.of(args[1:])
    _check_that_there_is_a_method(command, asked)
    for sentence in (*_unknown_options(asked), *_unknown_keys(asked)):
        raise UserError(sentence)
    with user_errors():
        _concept_not_named(command, asked)
        for name in ("judge", "second_judge"):
            judge = asked.value("model", name)
            if isinstance(judge, str) and judge not in ("null", "none", ""):
                check_short_name(judge, name)
        path = asked.options.get("ckpt_path")
        if path not in (None, "null", "last", "best", "hpc", ""):
            check_checkpoint(path)
            if path.endswith(".safetensors"):
                raise UserError(
                    f"{command}: ckpt_path={path} is a delta, without the run that it belongs to: give a run's "
                    "checkpoint; `generate`, `compare`, `export` and `attack --output` take a delta."
                )
        for name in ("after", "base_edit"):
            for place in asked.listed(name):
                check_checkpoint(place, name)


def concept_not_named(args: Sequence[str]) -> str | None:
    """The sentence that says which concepts a fit edits, and why, if its command line names none; else None.

    Args:
        args: A command of the trainer that ``check_early`` has passed.
    """
    return _concept_not_named(args[0], Asked.of(args[1:]))


def _check_that_there_is_a_method(command: str, asked: Asked) -> None:
    if asked.content.get("model", None) and not isinstance(asked.content["model"], dict):
        return
    of_recipe = asked.content.get("model") or {}
    if "class_path" in of_recipe or {"model", "model.class_path"} & set(asked.options):
        return
    if not asked.recipes:
        raise UserError("name a recipe that says what to run, e.g. --config null_space.yaml.")
    names = " ".join(f"--config {path.name}" for path in asked.recipes)
    raise UserError(
        f"{command}: {asked.recipes[-1].name} names no method: it is an overlay, which changes settings of the recipe "
        f"that stands before it; give a recipe of a method first, e.g. --config null_space.yaml {names}."
    )


def _concept_not_named(command: str, asked: Asked) -> str | None:
    """Check the concepts; the sentence that says which are edited if the command line of a fit names none.

    Raises:
        ValueError: There is no such concept, or no such set.
    """
    kind = asked.kind("model")
    if kind is None or not any(cls.name == "ConceptEditor" for cls in ancestors(kind)):
        return None
    concept = asked.concept
    if concept is None and {"print_config", "after", "base_edit"} & set(asked.options):  # these have concepts
        return None
    if concept is None:
        raise UserError(f"{command}: name the concept to edit, e.g. --concept dog.")
    if not isinstance(concept, str | list):
        return None
    if wrong := [name for name in concept if not isinstance(name, str)]:
        raise UserError(f"concept={concept}: {wrong[0]!r} is not the name of a concept: put a name in quotation marks.")
    concept_set = asked.value("model", "concept_set")
    if concept_set is None:
        default = (arguments_of(kind) or {}).get("concept_set")
        concept_set = ast.literal_eval(default.default) if default is not None and default.default else None
    if not isinstance(concept_set, str):
        return None
    edited = edited_concepts(concept, load_concept_set(concept_set))
    if "concept" not in asked.options and command == "fit":
        names = ", ".join(one.name for one in edited)
        which = next((path.name for path in reversed(asked.recipes) if "concept" in _read(path)), "the recipe")
        return f"no --concept is given, so the one of {which} is edited: {names}."
    return None


def _unknown_options(asked: Asked) -> Iterator[str]:
    """Sentences on the options that nothing has."""
    own = {option.name for option in OPTIONS} | {*LIGHTNINGS, *OF_THE_TRAINER, *SECTIONS}
    for key, typed in asked.names.items():
        section, _, rest = key.partition(".")
        first = rest.partition(".")[0].rstrip("+")
        known = _arguments(asked, section)
        if section in own and not rest:
            continue
        if section in ("model", "data", "edit"):
            if rest and first not in FREE and known is not None and first not in known:
                yield f"{section}: {asked.kind(section)} has no option {first!r}{closest(first, known)}."
        elif section != "trainer" or (known is not None and first not in known):
            if section in own and section != "trainer":  # a setting of an option's value
                continue
            yield f"there is no option {typed}{closest_key(typed.lstrip('-'), _all_keys(own))}."


def _unknown_keys(asked: Asked) -> Iterator[str]:
    """Sentences on the keys of recipes that nothing has."""
    for section in ("model", "data", "edit"):
        known = _arguments(asked, section)
        if {section, f"{section}.class_path"} & set(asked.options):  # another class; the parser drops what it lacks
            continue
        for name in asked.init_args(section) if known is not None else ():
            if name not in known:  # type: ignore[operator]
                yield f"{section}: {asked.kind(section)} has no option {name!r}{closest(str(name), known or ())}."


def _arguments(asked: Asked, section: str) -> Mapping[str, Any] | None:
    """The arguments that a section takes; None if they are not known without an import."""
    if section == "trainer":
        return trainer_options() or None
    kind = asked.kind(section)
    return arguments_of(kind) if kind is not None else None


def _all_keys(own: set[str]) -> list[str]:
    """All keys, for suggestions."""
    keys = [*sorted(own), *(f"trainer.{name}" for name in trainer_options())]
    roots = {
        "methods": ("model", "LightningModule"),
        "data": ("data", "LightningDataModule"),
        "core": ("edit", "Solver"),
    }
    for cls in our_classes().values():
        section, root = roots.get(cls.module.split(".")[1], ("", ""))
        if section and any(root in base.bases for base in ancestors(cls.name)):  # not what a method only works with
            keys += [f"{section}.{name}" for name in cls.arguments]
    return list(dict.fromkeys(keys))


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``first`` with the values of ``second``; mappings in both are merged, and a new class begins anew."""
    found = dict(first)
    for key, value in second.items():
        old = found.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            is_new = "class_path" in value and value["class_path"] != old.get("class_path", value["class_path"])
            found[key] = dict(value) if is_new else _merged(old, value)
        else:
            found[key] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
