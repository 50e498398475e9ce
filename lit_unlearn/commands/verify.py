"""``lit-unlearn verify``: check an export against its provenance and print what differs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_unlearn.commands.parser import Parser, add_config_folder, command_parser
from lit_unlearn.system.errors import user_errors

DESCRIPTION = "check an export against its provenance"


def parser() -> Parser:
    """Options of ``verify``."""
    made = command_parser("verify", DESCRIPTION)
    made.add_argument("export", metavar="EXPORT", help="exported folder, single file, delta or LoRA weights")
    made.add_argument(
        "--base", metavar="MODEL", help="also compare with this base model: folder, single file, emoji-sd or hub id"
    )
    made.add_argument("--revision", help="branch, tag or commit, if the base is a hub id")
    add_config_folder(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Check an export against its provenance and print what differs.

    Returns:
        The exit code: 0 if every check passes, else 1.

    Raises:
        UserError: ``export`` is not an export of lit-unlearn, or the base model does not exist.
    """
    from rich.console import Console

    from lit_unlearn.diffusion.base_model import BaseModel
    from lit_unlearn.edits.verify import findings_table, verify_export

    with user_errors():
        base = None
        if options.base is not None:
            base = BaseModel.find(options.base, options.revision, options.config_folder)
        findings = verify_export(Path(options.export), base)
    Console(soft_wrap=True).print(findings_table(findings))
    wrong = [finding for finding in findings if not finding.ok]
    print(
        f"{options.export}: "
        + (f"{len(wrong)} of {len(findings)} checks failed" if wrong else "as its provenance says")
    )
    for finding in findings:
        if finding.note:
            print(finding.note)
    return 1 if wrong else 0
