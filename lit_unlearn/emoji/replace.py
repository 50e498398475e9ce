"""Puts the parts that runs have trained into an embedded model, if the result is as good as the published model.

    python -m lit_unlearn.emoji.replace logs/emoji/text_to_image/version_0 logs/emoji/judge/version_0
    python -m lit_unlearn.emoji.replace logs/emoji/dit/version_0 --model emoji-dit

The new model is made beside the old one: a copy in which the parts of the runs, in order, replace its own. The whole
model is measured, which takes about three minutes on two cores, and then replaces the old one in one step, or nothing
is changed. The model card and the picture of samples are kept; renew them by hand (docs/emoji_sd.md). Pictures of the
unedited model that another model has drawn are left out; ``lit_unlearn.emoji.unedited`` makes them anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.source import EMBEDDED, resolve_model
from lit_unlearn.emoji.figures import figures_of_parts, figures_of_pictures, worse
from lit_unlearn.emoji.parts import FOLDER
from lit_unlearn.emoji.unedited import FILE
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.judges.emoji import EmojiJudge
from lit_unlearn.system.errors import UserError, user_errors
from lit_unlearn.system.files import copy_into, remove, replaced_folder

JUDGES = {"judge", "second_judge"}
"""Parts that draw nothing."""


def replace_model(runs: Sequence[Path], model: Path, figures: Path) -> None:
    """Put the parts that ``runs`` have trained into ``model``.

    Args:
        runs: Folders of runs of the recipes ``emoji/*.yaml``; if several runs have the same part, the last one counts.
        model: Folder of the embedded model; it is judged by its own judge, or by that of emoji-sd if it has none.
        figures: File with the published numbers, as ``benchmarks/emoji_sd.py`` writes it.

    Raises:
        ValueError: A run has no trained part, or the new model is worse than the published one; nothing is changed.
        WriteError: The folder cannot be written.
    """
    if not figures.is_file():
        raise ValueError(f"figures={figures} does not exist: give the published ones with --figures.")
    for run in runs:
        if not any((run / FOLDER).glob("*/*.safetensors")):
            raise ValueError(f"{run} has no {FOLDER} with weights: give the folder of a run that came to its end.")
    published = json.loads(figures.read_text(encoding="utf-8"))
    with replaced_folder(model) as folder:
        copy_into(model, folder)
        for run in runs:
            copy_into(run / FOLDER, folder)
        if {path.name for run in runs for path in (run / FOLDER).iterdir()} - JUDGES:
            remove(folder / FILE)
        own = folder / "judge"
        pipeline, judge = load_pipeline(str(folder)), ClassifierJudge(own) if own.is_dir() else EmojiJudge()
        _refuse_worse(worse(figures_of_parts(pipeline, judge), published), model)
        sampler = published["sampler"]
        found, _ = figures_of_pictures(pipeline, judge, sampler["num_inference_steps"], sampler["guidance_scale"])
        _refuse_worse(worse(found, published), model)


def _refuse_worse(behind: Sequence[str], model: Path) -> None:
    if behind:
        raise ValueError(f"The new model is worse than the published one, so {model} stays: {', '.join(behind)}.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, logs/emoji/.../version_N")
    parser.add_argument("--model", default=EMBEDDED, help="the embedded model, by name or folder; default: emoji-sd")
    parser.add_argument(
        "--figures", type=Path, help="the published figures; default: those of the model in docs/results"
    )
    options = parser.parse_args(args)
    try:
        with user_errors():
            model = Path(resolve_model(options.model))
            figures = options.figures or Path("docs/results", f"{model.name.replace('-', '_')}.json")
            replace_model(options.runs, model, figures)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{model} has the parts of {', '.join(map(str, options.runs))}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
