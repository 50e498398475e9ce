"""Turns exceptions into one sentence for the user at the terminal."""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

UNION = "Does not validate against any of the Union"
"""How jsonargparse begins when it has tried several types."""
EXPECTED = r"Expected an? (?!dot import)(?:<class ')?(?:typing\.)?(.+?)(?:'>)?(?:\. Got value: (.*))?"
OTHER_FORM = r"Expected a <class 'NoneType'>|Expected a path but|Not a valid subclass of"
"""Reasons that hold of nearly every value: what was meant is another form."""


class UserError(Exception):
    """A mistake of the user, as one sentence; found before any work is done."""


@contextmanager
def user_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn an error of ``kind`` in the block into a ``UserError``; any ``ValueError`` for checks only, not training."""
    try:
        yield
    except kind as error:
        raise UserError(essence(error)) from error


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show our own warnings of the block without file and line; those of libraries stay as they are."""
    before = warnings.formatwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> str:
        if Path(__file__).parents[1] in Path(filename).absolute().parents:
            return f"lit-unlearn: warning: {message}\n"
        return before(message, category, filename, *args, **kwargs)

    warnings.formatwarning = show
    try:
        yield
    finally:
        warnings.formatwarning = before


def warn(message: str) -> None:
    """Say ``message`` on the terminal as the warnings of ``plain_warnings`` are."""
    print(f"lit-unlearn: warning: {message}", file=sys.stderr)


@contextmanager
def plain_threads() -> Iterator[None]:
    """Report in one line if a thread could not write; TensorBoard writes its curves in a thread."""
    from lit_unlearn.system.files import WRITING

    before = threading.excepthook

    def say(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError) and args.exc_value.errno in WRITING:
            print(f"lit-unlearn: warning: curves are not complete: {args.exc_value.strerror}.", file=sys.stderr)
        else:
            before(args)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = before


def essence(error: BaseException) -> str:
    """Return the message of ``error`` in one line, without what jsonargparse wraps around that of an ``__init__``."""
    while str(error).startswith(UNION) and (inner := error.__cause__ or error.__context__) not in (None, error):
        error = inner  # type: ignore[assignment]
    message = str(error)
    if message.startswith(UNION) and (leaves := _leaves(message)):
        message = leaves[0].reason
    return " ".join(message.split())


def closest(name: str, known: Iterable[str]) -> str:
    """Return ``" (closest: name)"``, or an empty text if no known name is similar."""
    matches = get_close_matches(name, list(known), n=1)
    return f" (closest: {matches[0]})" if matches else ""


@dataclass(frozen=True)
class _Leaf:
    """A reason at the end of a branch of jsonargparse's message.

    Attributes:
        keys: Those that lead to it.
        owner: Class that was tried there; empty if none.
        reason: What it says.
    """

    keys: tuple[str, ...]
    owner: str
    reason: str

    @property
    def depth(self) -> int:
        """How far it is from the root: the deepest reason is that of what was meant."""
        return len(self.keys) + bool(self.owner)


def _leaves(message: str) -> list[_Leaf]:
    """The reasons in a message of jsonargparse: a tree of keys, classes and types that were tried, by indentation."""
    found: list[_Leaf] = []
    path: list[tuple[int, str, str]] = []  # indentation, then a key or the name of a class
    passed = -1  # indentation of a list of forms, which says nothing
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip(" ")) + 2 * line.lstrip(" ").startswith("- ")
        if not text or text.startswith((UNION, "Subtypes: ", "Errors:", "Given value", "Subclass types expect")):
            passed = indent if text.startswith("Subclass types expect") else -1
            continue
        if text.startswith("Not a valid subclass") or (passed >= 0 and line.strip().startswith("- a ")):
            continue
        while path and path[-1][0] >= indent:
            path.pop()
        if head := re.search(r"expects a function or a callable class: ", text):
            of = re.search(r"Got value: Namespace\(class_path='([^']+)'", text)
            if of:
                path.append((indent, "", of[1].rpartition(".")[2]))
            text, indent = text[head.end() :], indent + 1
        text = re.sub(r"\. Got value: (Namespace|NestedArg)\(.*", "", text)
        if found_key := re.fullmatch(r'Parser key "(.+?)":\s*(.*)', text):
            path.append((indent, found_key[1], ""))
            text = found_key[2]
        elif found_class := re.fullmatch(r"Problem with given class_path '(.+)':", text):
            path.append((indent, "", found_class[1].rpartition(".")[2]))
            continue
        if text:
            keys = tuple(key for _, key, _ in path if key)
            found.append(_Leaf(keys, path[-1][2] if path else "", text))
    return found


def parse_error(message: str, classes: Mapping[str, type], keys: Iterable[str]) -> str:
    """Reduce a message of jsonargparse to its essential line.

    Args:
        message: Its message: a tree of keys, classes and types that were tried. The deepest leaf is the reason.
        classes: Classes that a recipe may name, by name, for suggestions.
        keys: All keys of the parser, for suggestions.

    Returns:
        A sentence such as ``model: ValueRefinement has no option 'runds' (closest: rounds).``
    """
    leaves = _leaves(message) or [_Leaf((), "", " ".join(message.split()))]
    telling = [leaf for leaf in leaves if not re.match(OTHER_FORM, leaf.reason)] or leaves
    best = max(telling, key=lambda leaf: leaf.depth)  # the first of the deepest
    given = re.findall(r"Given value: (.*?)(?:\. Got value: .*)?$", message, flags=re.MULTILINE)
    value = None
    if given:  # the innermost comes first
        nested = re.fullmatch(r"NestedArg\(key='(.+?)', val='?(.*?)'?\)", given[0])
        value = nested[2] if nested else given[0]
    same = [leaf.reason for leaf in telling if (leaf.keys, leaf.owner) == (best.keys, best.owner)]
    reason = _one_of(same) or _reason(best.reason, best.owner, classes, keys, value)
    if reason.endswith(" expected") and value is not None:
        reason += f", got {value}"
    return f"{'.'.join(best.keys)}: {reason}".removeprefix(": ").rstrip(".") + "."


def _one_of(reasons: Sequence[str]) -> str | None:
    """What is expected where several types were tried, ``int or float expected``; None if a reason says more."""
    wanted: list[str] = []
    for reason in reasons:
        found = re.fullmatch(EXPECTED, reason)
        if found and found[2] is None:
            wanted.append(re.sub(r"^Literal\[", "one of [", found[1]))
        elif not wanted or not reason.startswith("Expected a dot import path string"):  # a number, or else an object
            return None
    return f"{' or '.join(dict.fromkeys(wanted))} expected" if wanted else None


def _reason(reason: str, owner: str, classes: Mapping[str, type], keys: Iterable[str], value: str | None) -> str:
    """Say a leaf of jsonargparse's message in the words of a recipe."""
    no_class = r"Expected a dot import path string: (.+)|Expected a path but (.+) either not accessible or invalid.*"
    if found := re.fullmatch(no_class, reason):
        name = found[1] or found[2]
        if name in classes:
            return f"{name} is not of the kind that belongs here"
        return f"there is no class or file {name!r}{closest(name, classes)}"
    if found := re.fullmatch(r"Option '(.+)' is not accepted", reason):
        every = options(classes[owner]) if owner in classes else []
        if found[1] in every:  # of a base, to which the class gives a value of its own
            return f"{owner} sets {found[1]!r} itself: leave it out"
        return f"{owner or 'the class'} has no option {found[1]!r}{closest(found[1], every)}"
    if found := re.fullmatch(r"Subcommand '.+' does not accept option '(.+)'", reason):
        return f"there is no key {found[1]!r}{closest_key(found[1], keys)}"
    if found := re.fullmatch(r"unrecognized arguments: (.+)", reason):
        option = found[1].split("=")[0].split()[0]
        known = closest_key(option.lstrip("-"), keys) if option.startswith("-") else ""
        if option.startswith("-"):
            return f"there is no option {option}{known}"
        return f"{found[1]!r} is not expected: several values are one list in quotes, as in --concept '[dog, cat]'"
    if found := re.fullmatch(EXPECTED, reason):
        wanted = re.sub(r"^Literal\[", "one of [", found[1])
        return f"{wanted} expected, got {found[2]}"
    if re.search(r"has no attribute 'keys'|^Unable to load config", reason):
        return f"settings expected, as in {{key: value}}, got {value or reason.rpartition('config ')[2]}"
    if "arguments are required: " in reason and ("model" in reason or "data" in reason):
        return "name a recipe that says what to run, e.g. --config null_space.yaml"
    return reason if owner == "" else f"{owner}: {reason}"


def closest_key(name: str, keys: Iterable[str]) -> str:
    """As ``closest``, for keys with dots: ``steps`` is near ``data.steps``, and ``modl.eta`` near ``model.eta``."""
    known = list(keys)
    ends = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if found := get_close_matches(name, ends, n=1, cutoff=0.0):
        return f" (closest: {found[0]})"
    return closest(name, known)


def options(cls: type) -> list[str]:
    """Names of the arguments of a class, those that it passes on to its bases included."""
    inits = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
    return [name for init in inits for name in inspect.signature(init).parameters if name not in ("self", "kwargs")]
