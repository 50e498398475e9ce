"""The command line. Help and version are printed before any heavy import, which would take seconds."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

from lit_unlearn import __version__
from lit_unlearn.commands.parser import check_output
from lit_unlearn.commands.registry import OTHER_COMMANDS, TRAINER_COMMANDS, command_modules
from lit_unlearn.judges.names import check_short_name
from lit_unlearn.system.collector import collecting_rarely
from lit_unlearn.system.environment import prepare_libraries
from lit_unlearn.system.errors import UserError, closest, essence, plain_threads, user_errors
from lit_unlearn.system.run_file import check_checkpoint, checkpoint_of
from lit_unlearn.system.signals import Preempted, default_signals, note_signal
from lit_unlearn.training.early import check_early
from lit_unlearn.training.help import command_help, wants_help
from lit_unlearn.training.recipes import recipe_names, recipe_summary, resolve_recipes

CLOSED_PIPE = 141
"""Exit code if the reader of the output has gone, as in ``lit-unlearn report | head``: that of SIGPIPE in a shell."""
TOLD_TO_STOP = 75
"""Exit code of a fit that a signal stopped: its state is saved, and the same command continues it (EX_TEMPFAIL)."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENOTDIR}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the program's name; by default the arguments of the process.

    Returns:
        The exit code: 0 for success; 1 if ``verify`` finds a difference; 2 for a mistake of the user or an output that
        cannot be written; 75 if a signal told a fit to save and stop, or a test to stop; 130 if interrupted; 141 if the
        reader of a pipe has gone. Errors during training are raised.
    """
    _say_everything()
    try:
        with plain_threads(), collecting_rarely():
            code = _run(list(sys.argv[1:] if args is None else args))
            sys.stdout.flush()  # here, where a closed pipe can still be caught
            return code
    except UserError as error:
        message = essence(error)
    except KeyboardInterrupt:
        print("\nlit-unlearn: interrupted", file=sys.stderr)
        return 130
    except Preempted as told:
        print(told, file=sys.stderr)
        return TOLD_TO_STOP
    except BrokenPipeError:
        # Python writes what is left when it ends, and would then complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except OSError as error:
        message = essence(_shown(error))
    except SystemExit as error:  # --help, --print_config
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    print(f"lit-unlearn: error: {message}", file=sys.stderr)
    return 2


def _say_everything() -> None:
    """Write escapes for characters that the terminal's encoding cannot show; a file or a pipe gets UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in Jupyter, nor in a program without a window
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def _shown(error: OSError) -> OSError:
    """The error to show to the user; an error that the user cannot do anything about is raised."""
    from lit_unlearn.system.files import WRITING, WriteError

    # Libraries raise an OSError without a number for a model that they cannot download.
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
    prepare_libraries()
    if command in ("fit", "test"):
        for name in default_signals():  # SLURM's warning that a job's time is up may come during the imports
            note_signal(name)
    if command in TRAINER_COMMANDS:
        resolved = resolve_recipes(args)
        if wants_help(resolved):
            print(command_help(command, TRAINER_COMMANDS[command], resolved[1:]))
            return 0
        check_early(resolved)
        resolved = [arg for arg in resolved if arg != "all" or "--help" not in resolved]
        from lit_unlearn.training import cli as training  # takes seconds

        training.run(resolved)
        return 0
    module = import_module(f"lit_unlearn.commands.{command}")
    options = module.parser().parse_args(rest)
    for name in (
        "output",
        "ckpt_path",
        "export",
        "single_file",
        "config_folder",
        "checkpoint",
    ):  # a shell does not expand the ~ in --output=~/a.png
        if isinstance(path := getattr(options, name, None), str):
            setattr(options, name, os.path.expanduser(path))
    if getattr(options, "ckpt_path", None) is not None:
        options.ckpt_path = str(checkpoint_of(options.ckpt_path))  # of a run's folder
    with user_errors():
        check_output(command, options)
        if getattr(options, "ckpt_path", None) is not None:
            check_checkpoint(options.ckpt_path)
        if command == "attack" and options.judge is not None:
            check_short_name(options.judge)
    return module.run(options) or 0


def overview() -> str:
    """Return what ``lit-unlearn --help`` prints."""
    others = {name: module.DESCRIPTION for name, module in command_modules().items()}
    lines = [f"  {name:11}{text}" for name, text in {**TRAINER_COMMANDS, **others}.items()]
    names = recipe_names()
    width = max(map(len, names), default=0) + 2
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
            "  lit-unlearn fit --config null_space.yaml --help    the keys of a recipe",
            "  lit-unlearn COMMAND --help, --version",
            "",
            "Recipes, by name from ./configs or the package, several --config override one another:",
            *(line for name in names for line in _in_two_lines(name, width)),
            "",
            "Exit codes: 0 success, 1 verify or doctor found a difference, 2 a mistake or an output that",
            "cannot be written, 75 told to stop (the same command goes on), 130 interrupted, 141 pipe closed.",
        ]
    )


def _in_two_lines(name: str, width: int) -> list[str]:
    """A recipe and what it is, in 80 columns."""
    lines = textwrap.wrap(recipe_summary(name), 78 - width, max_lines=2, placeholder=" …") or [""]
    return [f"  {name:{width}}{lines[0]}".rstrip(), *(f"  {'':{width}}{line}" for line in lines[1:])]
