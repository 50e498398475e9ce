"""Turns exceptions into one sentence for the user at the terminal."""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user, as one sentence; found before any work is done."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ``ValueError`` in the block into a ``UserError``; for checks only, never for training."""
    try:
        yield
    except ValueError as error:
        raise UserError(essence(error)) from error


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show each warning in the block once, without file and line."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **kwargs: f"lit-unlearn: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


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
    """Return the message of ``error`` in one line, without the text that jsonargparse adds around it."""
    message = str(error)
    if message.startswith("Does not validate against any"):
        cause = error.__cause__
        if cause is not None and not str(cause).startswith("Does not validate against any"):
            message = str(cause)
        elif found := re.search(r"^ *- (.+)", message, flags=re.MULTILINE):
            message = found[1]
    return " ".join(message.split())


def closest(name: str, known: Iterable[str]) -> str:
    """Return ``" (closest: name)"``, or an empty text if no known name is similar."""
    matches = get_close_matches(name, list(known), n=1)
    return f" (closest: {matches[0]})" if matches else ""


def parse_error(message: str, classes: Mapping[str, type], keys: Iterable[str]) -> str:
    """Reduce a message of jsonargparse to its essential line.

    Args:
        message: The message, a tree of keys, classes and types that were tried. The first leaf is the reason.
        classes: Classes that a recipe may name, by name, for suggestions.
        keys: All keys of the parser, for suggestions.

    Returns:
        A sentence such as ``model: ValueRefinement has no option 'runds' (closest: rounds).``
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    key = owner = reason = ""
    for line in lines:
        if found := re.fullmatch(r'Parser key "(.+?)":', line):
            key = f"{key}.{found[1]}" if key else found[1]
        elif found := re.fullmatch(r"Problem with given class_path '(.+)':", line):
            owner = found[1].rpartition(".")[2]
        elif found := re.fullmatch(r'Parser key "(.+?)": (.+)', line):
            key, reason = found[1], found[2]
        elif not line.startswith(("Does not validate against any", "Subtypes: ", "Errors:")):
            reason = line
        if reason:
            break
    given = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), None)
    return f"{key}: {_reason(reason, owner, given, classes, keys)}".removeprefix(": ").rstrip(".") + "."


def _reason(reason: str, owner: str, given: str | None, classes: Mapping[str, type], keys: Iterable[str]) -> str:
    """Rephrase a leaf of jsonargparse's message in the terms of a recipe."""
    if found := re.search(r"expects a function or a callable class: (.+?)(?:\. Got value: .*)?$", reason):
        reason, owner = found[1], ""
    no_class = r"Expected a dot import path string: (.+)|Expected a path but (.+) either not accessible or invalid.*"
    if found := re.fullmatch(no_class, reason):
        name = found[1] or found[2]
        if name in classes:
            return f"{name} is not of the kind that belongs here"
        return f"there is no class or file {name!r}{closest(name, classes)}"
    if found := re.fullmatch(r"Option '(.+)' is not accepted", reason):
        known = closest(found[1], _options(classes[owner])) if owner in classes else ""
        return f"{owner or 'the class'} has no option {found[1]!r}{known}"
    if found := re.fullmatch(r"Subcommand '.+' does not accept option '(.+)'", reason):
        return f"there is no key {found[1]!r}{closest(found[1], keys)}"
    if found := re.fullmatch(r"unrecognized arguments: (.+)", reason):
        option = found[1].split("=")[0].split()[0]
        known = closest(option.lstrip("-"), keys) if option.startswith("-") else ""
        return f"there is no option {option}{known}" if option.startswith("-") else f"{found[1]!r} is not expected"
    if found := re.fullmatch(r"Expected an? (?:<class ')?(?:typing\.)?(.+?)(?:'>)?(?:\. Got value: (.*))?", reason):
        value = found[2] if found[2] is not None else given
        wanted = found[1].replace("Literal", "one of ") if found[1].startswith("Literal") else found[1]
        return f"{wanted} expected, got {value}"
    if "arguments are required: " in reason and ("model" in reason or "data" in reason):
        return "name a recipe that says what to run, e.g. --config null_space.yaml"
    return reason if owner == "" else f"{owner}: {reason}"


def _options(cls: type) -> list[str]:
    """Names of the arguments of a class, including those that it passes on to its bases."""
    inits = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
    return [name for init in inits for name in inspect.signature(init).parameters if name not in ("self", "kwargs")]
