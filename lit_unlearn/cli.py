"""The command line. Help and version come before any heavy import, which takes seconds."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lit_unlearn import __version__
from lit_unlearn.system.errors import UserError, closest, essence, plain_threads, user_errors
from lit_unlearn.system.names import check_path
from lit_unlearn.system.signals import Preempted, default_signals, note_signal
from lit_unlearn.training.recipes import recipe_names, resolve_recipes

TRAINER_COMMANDS = {
    "fit": "find and apply an edit, or train a part of the embedded model",
    "validate": "draw a few pictures with a run's edited weights",
    "test": "score a run: pictures before and after, judged",
    "predict": "draw the evaluation pictures with a run's edited weights",
}
OTHER_COMMANDS = {
    "generate": "draw pictures of prompts, with or without an edit",
    "export": "write an edited pipeline for diffusers, or its changed weights",
    "attack": "try to bring the concept of a run back",
    "verify": "check an export against its provenance",
    "report": "compare tested runs: Markdown, CSV and one HTML page",
    "demo": "remove a concept from the embedded model, score and export it",
}
TOLD_TO_STOP = 75
"""Exit code of a fit that a signal has stopped: what it had is saved, and the same command goes on (EX_TEMPFAIL)."""
ATTACK_NAMES = ("concept_inversion", "prompt_search", "ring_a_bell", "relearning")
DTYPES = ("float32", "bfloat16", "float16")
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENOTDIR}


class Parser(argparse.ArgumentParser):
    """An argument parser that leaves it to ``main`` to report errors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError``."""
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}.")


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
    commands = {**TRAINER_COMMANDS, **OTHER_COMMANDS}
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
    options = PARSERS[command]().parse_args(rest)
    with user_errors():
        check_path("output", getattr(options, "output", None) or ".")
    from lit_unlearn import commands as run

    return getattr(run, command)(options) or 0


def overview() -> str:
    """Return what ``lit-unlearn --help`` prints."""
    lines = [f"  {name:10}{text}" for name, text in {**TRAINER_COMMANDS, **OTHER_COMMANDS}.items()]
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


def _parser(command: str) -> Parser:
    return Parser(
        prog=f"lit-unlearn {command}", description=f"{OTHER_COMMANDS[command].capitalize()}.", allow_abbrev=False
    )


def _add_model_options(parser: Parser, default: str) -> None:
    parser.add_argument("--model", help=f"diffusers folder, emoji-sd (embedded), or hub id; default: {default}")
    parser.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")


def generate_parser() -> Parser:
    """Options of ``generate``."""
    parser = _parser("generate")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="one prompt for a picture, several for a grid")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument("--ckpt_path", help="edit to apply: a run's checkpoint or a delta; default: none")
    _add_model_options(parser, "the one that was edited, or emoji-sd")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture of each prompt; default: 0")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt; default: 1")
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps; default: as in the run, or 15")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: as in the run, or 4")
    parser.add_argument("--scale", type=int, help="enlargement; default: to at least 256 pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures that are drawn at once; default: 8")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


def export_parser() -> Parser:
    """Options of ``export``."""
    parser = _parser("export")
    parser.add_argument("--ckpt_path", required=True, help="a run's checkpoint, or a delta")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--delta",
        action="store_true",
        help="write the changed weights only: DIR/delta.safetensors, or DIR if it is such a file",
    )
    parser.add_argument(
        "--lora", metavar="RANK", help="write LoRA weights of this rank at most, or of the one they need (auto)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as in the run")
    parser.add_argument(
        "--names", choices=("2022",), help="older tools want these: text_model. before the text encoder's weights"
    )
    _add_model_options(parser, "the one that was edited")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def verify_parser() -> Parser:
    """Options of ``verify``."""
    parser = _parser("verify")
    parser.add_argument("export", metavar="EXPORT", help="exported folder, delta or LoRA weights")
    parser.add_argument("--base", metavar="MODEL", help="also compare with this base model: folder, emoji-sd or hub id")
    parser.add_argument("--revision", help="branch, tag or commit, if the base is a hub id")
    return parser


def attack_parser() -> Parser:
    """Options of ``attack``."""
    parser = _parser("attack")
    parser.add_argument("--ckpt_path", required=True, help="a run's checkpoint, or a delta (then with --output)")
    parser.add_argument(
        "--attacks", nargs="+", metavar="NAME", help=f"which ones; default: all, {', '.join(ATTACK_NAMES)}"
    )
    parser.add_argument("--concept", nargs="+", metavar="NAME", help="edited concepts to attack; default: all of them")
    parser.add_argument("--num_pictures", type=int, default=10, help="pictures an attack is judged by; default: 10")
    parser.add_argument("--steps", type=int, help="steps of each attack; default: each attack's own")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures and searches; default: 0")
    parser.add_argument("--judge", help="emoji, llava, clip, nudenet, or a folder; default: the run's")
    parser.add_argument("--allow_names", action="store_true", help="searched prompts may hold the concept's own names")
    _add_model_options(parser, "the one that was edited")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write into; default: the run's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="run attacks again that have results")
    return parser


def report_parser() -> Parser:
    """Options of ``report``."""
    parser = _parser("report")
    parser.add_argument("folders", nargs="+", metavar="LOGS", help="folders that are searched for tested runs")
    parser.add_argument("-o", "--output", default="report", metavar="DIR", help="folder to write; default: report")
    parser.add_argument("--grids", type=int, default=1, help="picture grids of each method; default: 1")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    return parser


def demo_parser() -> Parser:
    """Options of ``demo``."""
    parser = _parser("demo")
    parser.add_argument("--concept", default="dog", help="concept to remove; default: dog")
    parser.add_argument("--config", default="null_space.yaml", help="recipe; default: null_space.yaml")
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "generate": generate_parser,
    "export": export_parser,
    "verify": verify_parser,
    "attack": attack_parser,
    "report": report_parser,
    "demo": demo_parser,
}
