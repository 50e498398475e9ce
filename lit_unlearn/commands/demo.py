"""``lit-unlearn demo``: edit, test and export, as a user would with three commands, and list the results."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from lit_unlearn.commands.parser import Once, Parser, command_parser
from lit_unlearn.training.recipes import find_recipe

DESCRIPTION = "remove a concept from the embedded model, score and export it"


def parser() -> Parser:
    """Options of ``demo``."""
    made = command_parser("demo", DESCRIPTION)
    made.add_argument("--concept", action=Once, default="dog", help="concept to remove; default: dog")
    made.add_argument(
        "--config", help="recipe; default: null_space.yaml, and null_space_context.yaml for a model that is named"
    )
    made.add_argument("--model", help="emoji-dit, or another model; default: emoji-sd")
    return made


def run(options: argparse.Namespace) -> None:
    """Edit, test and export, as a user would with three commands, and list the results.

    Raises:
        UserError: The recipe or the concept is wrong.
        OSError: Something cannot be written.
    """
    from lit_unlearn.commands import export
    from lit_unlearn.training import cli as training

    started = time.monotonic()
    config = options.config or ("null_space_context.yaml" if options.model else "null_space.yaml")
    model = ["--model", options.model] if options.model else []
    concept = ["--concept", options.concept]
    recipe = ["--config", config, *concept, *model]
    found = ["--config", str(find_recipe(config)), *concept, *(f"--model.model={name}" for name in model[1:])]
    _say("fit", *recipe)
    fit = training.run(["fit", *found])
    folder = Path(fit.trainer.log_dir or "")
    ckpt_path = str(folder / "checkpoints" / "last.ckpt")
    _say("test", *recipe, "--ckpt_path", ckpt_path)
    training.run(["test", *found, "--ckpt_path", ckpt_path])
    output = str(folder / "pipeline")
    _say("export", "--ckpt_path", ckpt_path, "--output", output)
    export.run(export.parser().parse_args(["--ckpt_path", ckpt_path, "--output", output]))

    where: dict[str, Path] = {
        "pictures before and after": folder / "grid.png",
        "scores": folder / "scores.json",
        "edited pipeline, for diffusers": Path(output),
        "everything else of the run": folder,
    }
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    for what, path in where.items():
        if path.exists():
            print(f"  {what + ':':32}{path}")
    print(f"  {'curves and pictures:':32}tensorboard --logdir {folder.parents[len(Path(fit.run_name).parts)]}")
    prompt = fit.edited[0].direct[0]
    print("\nTry next:")
    print(f"  {_command('generate', prompt, '--ckpt_path', ckpt_path, '--output', 'edited.png')}")
    steps = ("--num_inference_steps", str(fit.model.num_inference_steps))  # as the edit's
    print(f"  {_command('generate', prompt, *model, *steps, '--output', 'unedited.png')}")
    other = next(name for name in fit.concept_names if name not in {concept.name for concept in fit.edited})
    print(f"  {_command('demo', '--concept', other, *model)}")


def _command(*args: str) -> str:
    return shlex.join(["lit-unlearn", *args])


def _say(*args: str) -> None:
    print(f"\n$ {_command(*args)}", flush=True)
