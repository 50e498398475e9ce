"""Loads the judge that a recipe names: by a short name, the folder of a classifier, or the import path of a class."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lit_unlearn import judges
from lit_unlearn.data.concepts import Concept, ConceptSet
from lit_unlearn.judges.base import Judge, JudgeError, NamedJudge, UnknownQuestionError, is_quick
from lit_unlearn.judges.cache import CachedJudge
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.judges.names import no_judge
from lit_unlearn.system.classes import CLASS_PATH, checked_arguments, class_path, declared_classes, import_class

CONCEPTS = "concepts"
"""The argument of a judge's class that receives the concept set."""


def shipped_judges() -> dict[str, type[NamedJudge]]:
    """The judges of this package by their short names."""
    return declared_classes(judges, NamedJudge, "short_name")  # type: ignore[type-abstract]


def find_judge(judge: str, field: str = "judge") -> tuple[type, dict[str, Any]]:
    """The class that ``judge`` names, and the arguments that follow from the name alone.

    Raises:
        ValueError: There is no such judge.
    """
    shipped = shipped_judges()
    if judge in shipped:
        return shipped[judge], {}
    if os.path.isdir(folder := os.path.expanduser(judge)):
        return ClassifierJudge, {"path": Path(folder)}
    if not CLASS_PATH.fullmatch(judge):
        raise no_judge(judge, field, shipped)
    found = import_class(judge, field)
    if not _is_judge(found):
        raise ValueError(f"{field}={judge!r} is no judge: it needs a __call__(images, questions), and a name.")
    return found, {}


def check_judge_name(
    judge: str,
    options: Mapping[str, Any],
    concepts: ConceptSet | None,
    asked: Sequence[Concept] | None = None,
    field: str = "judge",
) -> type:
    """Check a judge, its options, the packages it needs and that it can answer all questions, without loading it.

    Args:
        judge: Short name of a judge of this package, folder of a ``ClassifierJudge``, or import path of a class.
        options: Arguments of the judge.
        concepts: The concept set; None if no question will be asked.
        asked: Concepts that it will be asked about; None for all concepts of the set.
        field: Name of the option for the judge; it begins the messages.

    Returns:
        The class of the judge.

    Raises:
        ValueError: Something is wrong; the message says what to do.
    """
    _arguments(judge, options, concepts, asked, field)
    return find_judge(judge, field)[0]


def load_judge(
    judge: str,
    options: Mapping[str, Any],
    concepts: ConceptSet | None,
    asked: Sequence[Concept] | None = None,
    field: str = "judge",
) -> Judge:
    """Load a judge; arguments as for ``check_judge_name``.

    Raises:
        JudgeError: As ``check_judge_name``; or the judge cannot be loaded.
    """
    found = find_judge(judge, field)[0]
    try:
        made = found(**_arguments(judge, options, concepts, asked, field))
    except JudgeError:
        raise
    except ImportError as error:
        raise JudgeError(f"{field}={judge!r} cannot be loaded ({error}): install what it needs.") from error
    except ValueError as error:
        raise JudgeError(str(error)) from error
    if not isinstance(made, Judge) or not isinstance(made.name, str) or not made.name:
        raise JudgeError(f"{field}={judge!r} has no name: set self.name to a text that names it and its version.")
    return made


def load_cached_judge(
    judge: str, options: Mapping[str, Any], concepts: ConceptSet | None, folder: Path | None
) -> Judge:
    """As ``load_judge``; if ``folder`` is given, the answers of a judge that is not quick are stored in it.

    Raises:
        JudgeError: As ``load_judge``.
    """
    made = load_judge(judge, options, concepts)
    return made if folder is None or is_quick(made) else CachedJudge(made, folder, cache_version(judge, options))


def cache_version(judge: str, options: Mapping[str, Any]) -> str:
    """Options and code of a user's own class, which change its answers although its name may stay the same.

    Empty for judges of this package, whose names contain everything.
    """
    found, _ = find_judge(judge)
    if found.__module__.startswith(f"{judges.__name__}."):
        return ""
    file = getattr(sys.modules[found.__module__], "__file__", None)
    code = Path(file).read_bytes() if file else b""
    given = json.dumps(dict(options), sort_keys=True, default=str)
    return f"{class_path(found)} {given} {hashlib.sha256(code).hexdigest()}"


def check_stored(judge: object, options: object, file: Path) -> None:
    """Refuse a judge that a checkpoint names if loading it would run code from outside this package.

    Raises:
        ValueError: It would run such code, or the checkpoint does not name a judge.
    """
    if not isinstance(judge, str) or not isinstance(options, dict):
        raise ValueError(f"ckpt_path={file} names no judge: give one with --judge.")
    classes: list[type] = [ClassifierJudge, *shipped_judges().values()]
    ours = {*shipped_judges(), *map(class_path, classes)}
    if CLASS_PATH.fullmatch(judge) and judge not in ours and not os.path.isdir(judge):
        raise ValueError(
            f"ckpt_path={file} names the judge {judge!r}, whose code is not part of lit-unlearn: "
            f"pass --judge {judge} if you trust it, or another judge."
        )


def _is_judge(cls: type) -> bool:
    """Whether the signature of ``cls`` is known and its instances can be called."""
    try:
        inspect.signature(cls)
    except ValueError:  # a class written in C
        return False
    return not inspect.isabstract(cls) and any("__call__" in vars(base) for base in cls.__mro__)


def _arguments(
    judge: str, options: Mapping[str, Any], concepts: ConceptSet | None, asked: Sequence[Concept] | None, field: str
) -> dict[str, Any]:
    """The arguments for the class of the judge, after all checks that are possible without loading it."""
    found, own = find_judge(judge, field)
    taken = {CONCEPTS} & set(inspect.signature(found).parameters)
    given = {**own, **checked_arguments(found, options, f"{field}_options", judge, {*own, *taken})}
    if taken and concepts is None:
        raise ValueError(f"{field}={judge!r} needs a concept set, and here is none.")
    if asked is None:
        asked = list(concepts.concepts.values()) if concepts is not None else []
    if isinstance(inspect.getattr_static(found, "check", None), classmethod):
        try:
            found.check(given, [concept.question for concept in asked])  # type: ignore[attr-defined]
        except UnknownQuestionError as error:
            raise JudgeError(_unanswered(judge, error, asked, concepts, field)) from error
        except ValueError as error:  # the class cannot tell judge from second_judge
            raise JudgeError(re.sub(r"\bjudge(?=_options\.|=)", field, str(error))) from error
    return {**given, **dict.fromkeys(taken, concepts)}


def _unanswered(
    judge: str, error: UnknownQuestionError, asked: Sequence[Concept], concepts: ConceptSet | None, field: str
) -> str:
    """The message for questions that a judge cannot answer; it lists the judges that can."""
    names = {concept.question: concept.name for concept in asked}
    unknown = [question for question in error.unknown if question in names]
    if not unknown:
        return str(error)
    first, more = unknown[0], len(unknown) - 1
    known = f" (it answers only {next(iter(error.known))!r})" if len(error.known) == 1 else ""
    if near := get_close_matches(first, error.known, n=1, cutoff=0.94):  # perhaps the same question in other words
        known = f" (closest: {near[0]!r})"
    others = []
    for name, cls in shipped_judges().items():
        try:
            cls.check({}, list(names))
        except UnknownQuestionError:
            continue
        except ValueError:  # a package is missing; loading that judge would report it
            pass
        others.append(name)
    return (
        f"{field}={judge!r} cannot answer {first!r}{known}, which {names[first]} of "
        f"{concepts.name if concepts else 'the set'} asks{f', nor {more} other questions of it' if more else ''}: "
        f"take {field}={' or '.join(others)}, or a classifier or class of your own that knows them."
    )
