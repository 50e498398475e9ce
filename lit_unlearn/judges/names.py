"""Short names of judges, read from their source files: importing the judges takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lit_unlearn.system.classes import CLASS_PATH
from lit_unlearn.system.errors import closest
from lit_unlearn.system.sources import our_classes


def short_names() -> list[str]:
    """The short names of the judges of this package."""
    found = our_classes(("judges",)).values()
    return sorted(cls.constants["short_name"] for cls in found if "short_name" in cls.constants)


def no_judge(judge: str, field: str, known: Iterable[str]) -> ValueError:
    """The error for a judge that is not one of ``known``, no folder and no import path."""
    names = list(known)
    others = f": take {', '.join(names)}, the folder of a classifier, or the import path of a class"
    return ValueError(f"{field}={judge!r} is no judge and no folder{closest(judge, names) or others}.")


def check_short_name(judge: str, field: str = "judge") -> None:
    """Refuse a judge that is not a short name, a folder or an import path.

    Raises:
        ValueError: Nothing has that name.
    """
    known = short_names()
    if judge not in known and not os.path.isdir(os.path.expanduser(judge)) and not CLASS_PATH.fullmatch(judge):
        raise no_judge(judge, field, known)
