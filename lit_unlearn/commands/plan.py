"""``lit-unlearn plan``: say what a fit would edit, compute and need in memory, without loading weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lit_unlearn.commands.parser import Parser, command_parser

DESCRIPTION = "say what a fit edits and needs in memory; loads no weights"


class PlanParser(Parser):
    """Keeps the options that are not its own: they are those of ``fit``."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ``argparse``, with the other options as ``fit``."""
        options, others = self.parse_known_args(args, namespace)
        options.fit = others
        return options


def parser() -> Parser:
    """Options of ``plan``."""
    made = command_parser("plan", DESCRIPTION, PlanParser)
    made.usage = "lit-unlearn plan --config RECIPE [--config OVERLAY] [--model MODEL] [any option of fit]"
    made.add_argument(
        "--model",
        help="folder with the model's configurations (weights are not needed), hub id, or an architecture such as "
        "sdxl or flux1_dev; default: the recipe's",
    )
    return made


def run(options: argparse.Namespace) -> None:
    """Print the plan of a fit.

    Raises:
        UserError: The recipe, its values or the model is wrong.
    """
    from rich.console import Console

    from lit_unlearn.system.errors import UserError
    from lit_unlearn.training.plan import plan_fit
    from lit_unlearn.training.plan_table import WIDTH
    from lit_unlearn.training.recipes import resolve_recipes

    if not any(arg.partition("=")[0] in ("--config", "-c") for arg in options.fit):
        raise UserError("plan: give a recipe, such as --config null_space_context.yaml.")
    model = [] if options.model is None else [f"--model.init_args.model={options.model}"]
    plan = plan_fit(resolve_recipes(["fit", *options.fit, *model, "--trainer.accelerator=cpu"]))
    plan.print(Console(width=WIDTH, highlight=False))
