"""``lit-unlearn erase "Mickey Mouse" --to "a cartoon mouse"``: from a name to an edited model, scored and exported.

Data flow, each step refusing what the next could not use, and no model is loaded before the third:

1. ``data.templates`` (for the embedded models ``emoji.concepts``) makes a concept set of the name; the judge is chosen
   and asked what it can answer; the recipe is found; ``training.erasure.Plan`` has all of it and says what will be
   drawn and written. ``--dry_run`` ends here.
2. ``Plan.write``: ``logs/METHOD/NAME@erase-KEY/`` gets ``concepts.yaml`` and ``recipe.yaml``, a recipe as any other.
   KEY is a hash of the set, so a folder has one set.
3. ``check_drawn``: the unedited model draws the concept's evaluation prompts and the judge looks: a concept that is not
   drawn cannot be erased.
4. ``fit``, ``test`` and ``export`` with that recipe, as a user would call them; without a judge, pictures before and
   after instead of a test.
5. ``evaluation.verdict``: whether it worked, what was written, and the command that repeats it.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

from lit_unlearn.commands.parser import Once, Parser, add_clip_skip, command_parser
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.system.errors import plain_warnings, user_errors
from lit_unlearn.training.erasure import STEPS, Plan, Request, check_drawn, check_request, plan_of

DESCRIPTION = "erase a concept that you name: write its prompts, edit, score and export"


def parser() -> Parser:
    """Options of ``erase``."""
    made = command_parser("erase", DESCRIPTION)
    made.add_argument("concept", metavar="NAME", help="what to erase, as people write it; an object needs no article")
    made.add_argument("--to", action=Once, help="what to draw in its place")
    made.add_argument("--kind", default="object", help=f"{', '.join(KINDS)}; default: object")
    made.add_argument("--also", action="append", default=[], metavar="NAMES", help="further words for it, by commas")
    made.add_argument(
        "--protect", action="append", default=[], metavar="NAMES", help="neighbours that must stay, by commas"
    )
    made.add_argument("--retain", metavar="FILE", help="prompts that must stay: .csv with a column prompt, or .txt")
    made.add_argument("--prompts", metavar="FILE", help="prompts of the concept to judge too: .csv or .txt")
    made.add_argument("--method", help="recipe; default: null_space, and null_space_context if a model is named")
    made.add_argument("--model", help="diffusers folder or hub id; default: emoji-sd, which is embedded")
    made.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
    add_clip_skip(made, "none")
    made.add_argument(
        "--base_edit", action="append", default=[], metavar="EDIT", help="run or delta of an earlier edit to start from"
    )
    made.add_argument("--judge", help="judge, or none; default: emoji for the embedded models, else clip")
    made.add_argument("--question", help="question to the judge; yes means that the picture shows the concept")
    made.add_argument("--images_per_prompt", type=int, help="pictures of each prompt; default: 2 of emoji-sd, else 1")
    made.add_argument("--num_inference_steps", type=int, help=f"denoising steps; default: {STEPS}, for emoji-sd 8")
    made.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: the family's usual")
    made.add_argument("--output", "-o", metavar="DIR", help="folder for the edited model; default: in the run")
    made.add_argument("--delta", action="store_true", help="write only the changed weights")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export in --output")
    made.add_argument("--anyway", action="store_true", help="edit even if the model does not draw the concept")
    made.add_argument("--dry_run", action="store_true", help="say what would be done, and stop")
    return made


def run(options: argparse.Namespace) -> int:
    """Erase a concept; see the module.

    Returns:
        0 if the concept is erased and the others are kept, or nothing was judged; 1 if the edit failed.

    Raises:
        UserError: An option is wrong, or the model does not draw the concept.
        OSError: Something cannot be written.
    """
    with user_errors(), plain_warnings():
        request = request_of(options)
        check_request(request)
        if options.output is not None:
            from lit_unlearn.edits.export import output_path

            output_path(Path(options.output), "delta.safetensors" if options.delta else None, options.overwrite)
        plan = plan_of(request)
    print("\n".join(plan.lines()))
    if options.dry_run:
        return 0
    from lit_unlearn.training import cli as training

    plan = check_drawn(plan)
    recipe = plan.write()
    args = ["fit", "--config", str(recipe), "--concept", plan.concept.name]
    _say(*args)
    fit = training.run(args)
    folder = Path(fit.trainer.log_dir or "")
    ckpt_path = str(folder / "checkpoints" / "last.ckpt")
    if plan.judge is not None:
        _say("test", "--config", str(recipe), "--ckpt_path", ckpt_path)
        training.run(["test", "--config", str(recipe), "--ckpt_path", ckpt_path])
    else:
        draw_pairs(plan, ckpt_path, folder / "grid.png")
    output = _export(options, ckpt_path, folder)
    return _conclude(plan, folder, recipe, output)


def request_of(options: argparse.Namespace) -> Request:
    """What the options ask for."""
    known = {item.name for item in fields(Request)}
    return Request(**{name: value for name, value in vars(options).items() if name in known})


def draw_pairs(plan: Plan, ckpt_path: str, path: Path) -> None:
    """Draw the concept's prompts with the unedited and with the edited model, into one picture.

    Raises:
        UserError: The edit cannot be applied.
        OSError: The picture cannot be written.
    """
    from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit
    from lit_unlearn.edits.drawing import draw_all
    from lit_unlearn.evaluation.grids import before_after_grid
    from lit_unlearn.system.devices import find_device
    from lit_unlearn.system.pixels import save_png

    prompts, how = list(plan.concept.prompts), (plan.steps, plan.guidance_scale, 8 if plan.embedded else 2)
    with user_errors(), plain_warnings():
        pipeline, pretrained = load_with_pretrained(plan.base, read_edit(ckpt_path), find_device())
        after = draw_all(pipeline, prompts, [0], *how)
        with pretrained.restored():
            before = draw_all(pipeline, prompts, [0], *how)
    save_png(path, before_after_grid(before, after, prompts))


def _export(options: argparse.Namespace, ckpt_path: str, folder: Path) -> str:
    """Export the edit; the path of what was written."""
    from lit_unlearn.commands import export

    output = options.output or str(folder / ("delta.safetensors" if options.delta else "pipeline"))
    arguments = ["--ckpt_path", ckpt_path, "--output", output]
    arguments += [f"--{name}" for name in ("delta", "overwrite") if getattr(options, name)]
    _say("export", *arguments)
    export.run(export.parser().parse_args(arguments))
    return output


def _conclude(plan: Plan, folder: Path, recipe: Path, output: str) -> int:
    """Print the verdict, what was written and what to do next; the exit code."""
    from lit_unlearn.evaluation.scores import Scores
    from lit_unlearn.evaluation.verdict import Verdict, verdict_of

    verdict = Verdict(True, [f"Not judged: see {folder / 'grid.png'}, above without the edit, below with it."])
    if plan.judge is not None:
        verdict = verdict_of(Scores.load(folder / "scores.json"))
    print("\n" + "\n".join(verdict.lines))
    if not verdict.succeeded:
        others = [name for name in ("null_space_context", "uce", "speed", "esd") if name != plan.recipe["method"]]
        print(f"The edit failed. Look at the pictures; other methods are --method {', '.join(others)}.")
    where = {
        "edited model": Path(output),
        "pictures before and after": folder / "grid.png",
        "scores": folder / "scores.json",
        "concept set": plan.concepts.path,
        "recipe": recipe,
        "everything else of the run": folder,
    }
    print()
    for what, path in where.items():
        if path.exists():
            print(f"  {what + ':':28}{path}")
    again = _command("fit", "--config", str(recipe), "--concept", plan.concept.name)
    print(f"\nThe same edit again, as a recipe:\n  {again}")
    return 0 if verdict.succeeded else 1


def _command(*args: str) -> str:
    return shlex.join(["lit-unlearn", *args])


def _say(*args: str) -> None:
    print(f"\n$ {_command(*args)}", flush=True)
