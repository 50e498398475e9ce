"""``lit-unlearn attack``: attack an edited model, write the results into the run's folder, and print them."""

from __future__ import annotations

import argparse
import re
from typing import Any

from lit_unlearn.commands.parser import Listing, Parser, add_model_options, command_parser

DESCRIPTION = "try to bring the concept of a run back"
SETTING = re.compile(r"--([\w.]+)\.(\w+)(?:=(.*))?", flags=re.DOTALL)
"""A field of an attack, ``--prompt_search.num_tokens 8``, or of the judge, ``--judge_options.batch_size 4``."""


class AttackParser(Parser):
    """Also accepts the fields of attacks and judges, and stores them as text in ``settings`` and ``judge_options``."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; arguments that are not such fields either are returned as the rest."""
        options, rest = super().parse_known_args(*args, **kwargs)
        options.settings, left = {}, []
        words = iter(rest)
        for word in words:
            if found := SETTING.fullmatch(word):
                name, field, value = found.groups()
                if value is None and (value := next(words, None)) is None:
                    self.error(f"{word} expects a value")
                options.settings.setdefault(name, {})[field] = value
            else:
                left.append(word)
        options.judge_options = options.settings.pop("judge_options", None)
        return options, left


def parser() -> Parser:
    """Options of ``attack``."""
    made = command_parser("attack", DESCRIPTION, AttackParser)
    made.add_argument("--ckpt_path", required=True, help="a run's checkpoint, or a delta (then with --output)")
    what = "which ones, or import paths; default: all of ours"
    made.add_argument("--attacks", nargs="+", action="extend", metavar="NAME", help=what)
    what = "list the attacks and their fields, which are set as --prompt_search.num_tokens 8"
    made.add_argument("--attacks.help", action=Listing, listing=list_attacks, help=what)
    what = "edited concepts to attack; default: all of them"
    made.add_argument("--concept", nargs="+", action="extend", metavar="NAME", help=what)
    made.add_argument("--num_pictures", type=int, default=10, help="pictures an attack is judged by; default: 10")
    made.add_argument("--steps", type=int, help="steps of each attack; default: each attack's own")
    made.add_argument(
        "--budget", type=float, metavar="FACTOR", help="multiply each attack's own steps, instead of --steps"
    )
    what = "search from so many starts, and keep the one that works best on other pictures; default: 1"
    made.add_argument("--restarts", type=int, default=1, metavar="N", help=what)
    made.add_argument("--seed", type=int, default=0, help="seed of pictures and searches; default: 0")
    made.add_argument("--guidance_scale", type=float, help="guidance of the attacker's pictures; default: the run's")
    what = "prompt that the attacker's guidance leads away from; default: the empty one"
    made.add_argument("--negative_prompt", metavar="PROMPT", help=what)
    made.add_argument("--judge", help="a judge, a classifier's folder, or an import path; default: the run's")
    what = "list the judges and their options, which are set as --judge_options.batch_size 4"
    made.add_argument("--judge.help", action=Listing, listing=list_judges, help=what)
    made.add_argument("--allow_names", action="store_true", help="searched prompts may contain the concept's own names")
    add_model_options(made, "the one that was edited")
    made.add_argument("-o", "--output", metavar="DIR", help="folder to write into; default: the run's")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    made.add_argument("--overwrite", action="store_true", help="run attacks again that have results")
    return made


def list_attacks() -> str:
    """The attacks of this package and their fields."""
    from lit_unlearn.attacks.catalog import shipped_attacks
    from lit_unlearn.system.classes import describe

    return describe(shipped_attacks())


def list_judges() -> str:
    """The judges of this package and their options."""
    from lit_unlearn.judges.load import CONCEPTS, shipped_judges
    from lit_unlearn.system.classes import describe

    return describe(shipped_judges(), "judge_options", skip=[CONCEPTS])


def run(options: argparse.Namespace) -> None:
    """Attack an edited model, write the results into the run's folder, and print them.

    Raises:
        UserError: An option, the checkpoint, the model or the judge is wrong, or there is no attack to run.
        OSError: The output cannot be written.
    """
    from rich.console import Console

    from lit_unlearn import api
    from lit_unlearn.reports.attack_results import attacks_table

    results = api.attack(
        options.ckpt_path,
        options.attacks,
        concepts=options.concept,
        num_pictures=options.num_pictures,
        steps=options.steps,
        budget=options.budget,
        restarts=options.restarts,
        settings=options.settings,
        allow_names=options.allow_names,
        seed=options.seed,
        guidance_scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        judge=options.judge,
        judge_options=options.judge_options,
        model=options.model,
        revision=options.revision,
        config_folder=options.config_folder,
        output=options.output,
        device=options.device,
        overwrite=options.overwrite,
    )
    Console().print(attacks_table(results, f"{options.ckpt_path}: pictures that show the concept"))
