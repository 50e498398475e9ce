"""The command line. Help and version come before any heavy import, which takes seconds."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lit_unlearn import __version__
from lit_unlearn.commands.parser import check_output
from lit_unlearn.system.errors import UserError, closest, essence, plain_threads, user_errors
from lit_unlearn.system.signals import Preempted, default_signals, note_signal
from lit_unlearn.training.recipes import recipe_names, resolve_recipes

TRAINER_COMMANDS = {
    "fit": "find and apply an edit, or train a part of the embedded model",
    "validate": "draw a few pictures with a run's edited weights",
    "test": "score a run: pictures before and after, judged",
    "predict": "draw the evaluation pictures with a run's edited weights",
}
OTHER_COMMANDS = ("generate", "export", "attack", "verify", "report", "demo")
"""Each is a file of ``lit_unlearn/commands``."""
TOLD_TO_STOP = 75
"""Exit code of a fit that a signal has stopped: what it had is saved, and the same command goes on (EX_TEMPFAIL)."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENOTDIR}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0; 1 if ``verify`` finds a difference; 2 for a mistake of the user's or an output that cannot be
        written; 75 if a signal told a fit to save and stop, or a test to stop; 130 if interrupted. Errors within a
        training are raised.
    """
    _say_everything()
    try:
        with plain_threads():
            return _run(list(sys.argv[1:] if args is None else args))
    except UserError as error:
        message = essence(error)
    except KeyboardInterrupt:
        print("\nlit-unlearn: interrupted", file=sys.stderr)
        return 130
    except Preempted as told:
        print(told, file=sys.stderr)
        return TOLD_TO_STOP
    except OSError as error:
        message = essence(_shown(error))
    except SystemExit as error:  # --help, --print_config
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    print(f"lit-unlearn: error: {message}", file=sys.stderr)
    return 2


def _say_everything() -> None:
    """Let a terminal show an escape for a character that its encoding lacks; a file or a pipe gets UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Jupyter has others, and a program without a window has none
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def _shown(error: OSError) -> OSError:
    """``error`` as the person at the terminal is told of it; raised if it is none of the person's concern."""
    from lit_unlearn.system.files import WRITING, WriteError

    # Without a number it is what libraries say of a model that they cannot fetch.
    if isinstance(error, WriteError) or error.errno is None:
        return error
    if error.errno in WRITING:
        return WriteError(error.filename or "the output", error)
    if error.errno in FORBIDDEN:
        return error
    raise error


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"lit-unlearn {__version__}")
        return 0
    command, *rest = args
    commands = (*TRAINER_COMMANDS, *OTHER_COMMANDS)
    if command not in commands:
        known = closest(command, commands) or f" (commands: {', '.join(commands)})"
        raise UserError(f"There is no command {command!r}{known}.")
    # Imports of transformers and diffusers that a terminal needs no advice on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # What PyTorch has not written for Apple's GPU yet runs on the processor; to be set before it is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if command in ("fit", "test"):
        for name in default_signals():  # SLURM's, before a job's time is up, may come while Python still imports
            note_signal(name)
    if command in TRAINER_COMMANDS:
        resolved = resolve_recipes(args)
        from lit_unlearn.training import cli as training

        training.run(resolved)
        return 0
    module = import_module(f"lit_unlearn.commands.{command}")
    options = module.parser().parse_args(rest)
    for name in ("output", "ckpt_path", "export"):  # a shell leaves the ~ of --output=~/a.png
        if isinstance(path := getattr(options, name, None), str):
            setattr(options, name, os.path.expanduser(path))
    with user_errors():
        check_output(command, options)
    return module.run(options) or 0


def overview() -> str:
    """Return what ``lit-unlearn --help`` prints."""
    others = {name: import_module(f"lit_unlearn.commands.{name}").DESCRIPTION for name in OTHER_COMMANDS}
    lines = [f"  {name:10}{text}" for name, text in {**TRAINER_COMMANDS, **others}.items()]
    return "\n".join(
        [
            "usage: lit-unlearn COMMAND [options]",
            "",
            "Removes concepts from text-to-image diffusion models.",
            "",
            *lines,
            "",
            "  lit-unlearn demo --concept dog",
            "  lit-unlearn fit --config null_space.yaml --concept dog",
            "  lit-unlearn test --config null_space.yaml --concept dog",
            "  lit-unlearn COMMAND --help, --version",
            "",
            "Recipes, by name from ./configs or the package, several --config override one another:",
            *(f"  {name}" for name in recipe_names()),
        ]
    )
