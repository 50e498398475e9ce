"""``lit-unlearn attack``: attack an edited model, write what came of it into the run's folder, and print it."""

from __future__ import annotations

import argparse

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import user_errors

DESCRIPTION = "try to bring the concept of a run back"
ATTACK_NAMES = ("concept_inversion", "prompt_search", "ring_a_bell", "relearning")


def parser() -> Parser:
    """Options of ``attack``."""
    made = command_parser("attack", DESCRIPTION)
    made.add_argument("--ckpt_path", required=True, help="a run's checkpoint, or a delta (then with --output)")
    made.add_argument(
        "--attacks",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"which ones; default: all, {', '.join(ATTACK_NAMES)}",
    )
    made.add_argument(
        "--concept", nargs="+", action="extend", metavar="NAME", help="edited concepts to attack; default: all of them"
    )
    made.add_argument("--num_pictures", type=int, default=10, help="pictures an attack is judged by; default: 10")
    made.add_argument("--steps", type=int, help="steps of each attack; default: each attack's own")
    made.add_argument("--seed", type=int, default=0, help="seed of pictures and searches; default: 0")
    made.add_argument("--judge", help="emoji, llava, clip, nudenet, or a folder; default: the run's")
    made.add_argument("--allow_names", action="store_true", help="searched prompts may hold the concept's own names")
    add_model_options(made, "the one that was edited")
    made.add_argument("-o", "--output", metavar="DIR", help="folder to write into; default: the run's")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    made.add_argument("--overwrite", action="store_true", help="run attacks again that have results")
    return made


def run(options: argparse.Namespace) -> None:
    """Attack an edited model, write what came of it into the run's folder, and print it.

    Raises:
        UserError: An option, the checkpoint, the model or the judge is wrong, or there is nothing to attack with.
        OSError: The output cannot be written.
    """
    from rich.console import Console

    from lit_unlearn.attacks.run import attack_run
    from lit_unlearn.reports.attack_results import attacks_table
    from lit_unlearn.system.devices import explaining_memory, find_device

    with user_errors():
        device = find_device(options.device)
    ways = ["attack on the processor (--device cpu)"] if device.type != "cpu" else []
    with user_errors(), explaining_memory("attack", device, ways):
        results = attack_run(
            options.ckpt_path,
            options.attacks,
            concepts=options.concept,
            num_pictures=options.num_pictures,
            steps=options.steps,
            seed=options.seed,
            judge=options.judge,
            allow_names=options.allow_names,
            model=options.model,
            revision=options.revision,
            output=options.output,
            device=options.device,
            existing="replace" if options.overwrite else "refuse",
            say=print,
        )
    Console().print(attacks_table(results, f"{options.ckpt_path}: pictures that show the concept"))
