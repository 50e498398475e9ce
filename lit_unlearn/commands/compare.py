"""``lit-unlearn compare``: draw prompts with several edits and without one, side by side on one HTML page.

Data flow: every edit is read and checked; each pipeline is loaded with both values of the edited weights, draws all
prompts and seeds, and its pictures are judged by its run's judge; the unedited pictures are drawn once, by the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import plain_warnings, user_errors
from lit_unlearn.system.files import atomic_write
from lit_unlearn.system.names import check_numbers, check_prompts
from lit_unlearn.system.run_file import checkpoint_of

if TYPE_CHECKING:
    from torch import Tensor


DESCRIPTION = "show prompts with several edits side by side, on one HTML page"
ROWS = 400
"""Most pictures in a column; a page with more would be too large for a browser."""


def parser() -> Parser:
    """Options of ``compare``."""
    made = command_parser("compare", DESCRIPTION)
    made.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, its checkpoint, or a delta")
    what = "prompts, or lists (.txt, .csv with a column prompt); default: the edited concepts' own"
    made.add_argument("--prompts", nargs="+", action="extend", metavar="PROMPT", help=what)
    made.add_argument("-o", "--output", default="compare.html", metavar="FILE.html", help="default: compare.html")
    add_model_options(made, "the one that was edited")
    made.add_argument("--seed", type=int, default=0, help="seed of the first picture of each prompt; default: 0")
    made.add_argument("--num", type=int, default=1, help="pictures of each prompt; default: 1")
    made.add_argument("--num_inference_steps", type=int, help="denoising steps; default: the runs'")
    made.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: the runs'")
    made.add_argument("--batch_size", type=int, default=8, help="pictures drawn at once; default: 8")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    made.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return made


def run(options: argparse.Namespace) -> None:
    """Draw the prompts with and without each edit, judge the pictures, and write the page.

    Raises:
        UserError: An option, an edit or the model is wrong.
        OSError: The page cannot be written.
    """
    from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit, warn_unfinished
    from lit_unlearn.edits.drawing import draw_all
    from lit_unlearn.edits.judging import concept_set_of_edit, judge_of_edit
    from lit_unlearn.edits.several import agreed, one_base, titles_of
    from lit_unlearn.judges.base import judge_questions
    from lit_unlearn.reports.comparison import Column, comparison_page
    from lit_unlearn.system.devices import explaining_memory, find_device

    output = Path(options.output)
    with user_errors():
        if output.exists() and not options.overwrite:
            raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")
        numbers = ("num", "num_inference_steps", "batch_size")
        check_numbers(**{name: getattr(options, name) for name in numbers})
        files = [checkpoint_of(given) for given in options.runs]
        edits = [read_edit(file) for file in files]
        steps = agreed(edits, "num_inference_steps", options.num_inference_steps)
        guidance_scale = agreed(edits, "guidance_scale", options.guidance_scale)
        sets = [concept_set_of_edit(edit) for edit in edits]
        concepts = [[concepts.get(name) for name in edit.concepts] for edit, concepts in zip(edits, sets, strict=True)]
        of_concepts = [prompt for found in concepts for concept in found for prompt in concept.direct[:2]]
        prompts = list(dict.fromkeys(prompts_of(options.prompts) if options.prompts else of_concepts))
        check_prompts(prompts)
        if len(prompts) * options.num > ROWS:
            raise ValueError(f"prompts and num give {len(prompts) * options.num} pictures a run: give at most {ROWS}.")
        base = one_base(edits, options.model, options.revision, options.config_folder)
        base.check_steps(int(steps), "num_inference_steps")
        judges = [
            judge_of_edit(edit, None, None, concept_set, asked)
            for edit, concept_set, asked in zip(edits, sets, concepts, strict=True)
        ]
        device = find_device(options.device)
    for file in files:
        warn_unfinished(file)
    seeds = [options.seed + number for number in range(options.num)]
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    unedited: Tensor | None = None
    seen: dict[str, Tensor] = {}
    columns = []
    ways = [f"draw fewer at once (--batch_size, now {options.batch_size})"] if options.batch_size > 1 else []
    titles = titles_of(edits)
    for title, edit, asked, judge in zip(titles, edits, concepts, judges, strict=True):
        with user_errors(), plain_warnings(), explaining_memory("compare", device, ways):
            pipeline, pretrained = load_with_pretrained(base, edit, device)
            drawn = draw_all(pipeline, prompts, seeds, int(steps), guidance_scale, options.batch_size)
            if unedited is None:
                with pretrained.restored():
                    unedited = draw_all(pipeline, prompts, seeds, int(steps), guidance_scale, options.batch_size)
        shown = {}
        for concept in asked:
            questions = [concept.question] * len(rows)
            shown[concept.name] = judge_questions(judge, drawn, questions)
            if concept.name not in seen:
                seen[concept.name] = judge_questions(judge, unedited, questions)
        columns.append(Column(title, drawn, shown))
    assert unedited is not None
    how = f"{base.name}, {steps:g} denoising steps, guidance {guidance_scale:g}."
    first = Column("unedited", unedited, seen)
    page = comparison_page("Edits side by side", how, rows, first, columns)
    with atomic_write(output) as page_file:
        page_file.write(page.encode())
    print(output)


def prompts_of(given: Sequence[str]) -> list[str]:
    """The prompts that are given, and those in the lists that are given (``data.tables``); their seeds are not used.

    Raises:
        ValueError: A list has no prompt, or cannot be read.
    """
    from lit_unlearn.data.tables import read_prompts

    lists = (".txt", ".csv", ".tsv")
    found = [[row.prompt for row in read_prompts(text)] if text.endswith(lists) else [text] for text in given]
    return [prompt for prompts in found for prompt in prompts]
