"""Which options an export takes together, without PyTorch: a mistake is told before that is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Form = Literal["folder", "delta", "lora", "single"]
FORMS: tuple[Form, ...] = ("folder", "delta", "lora", "single")


def check_form(
    form: str, rank: int | str | None, dtype: str | None, names: str | None, single_file: str | Path | None
) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: What, and what to do.
    """
    if form not in FORMS:
        raise ValueError(f"format={form!r} is not one of {', '.join(FORMS)}.")
    if single_file and form != "single":
        raise ValueError("--single_file FILE needs --format single: the edit is written into a copy of that file.")
    if form == "single":
        for option, value in (("names", names), ("dtype", dtype)):
            if value:
                why = "the copy has the types of the file" if option == "dtype" else "choose one form"
                raise ValueError(f"--format single cannot be combined with --{option}: {why}.")
    if names not in (None, "2022"):
        raise ValueError(f"names={names!r} is not known: leave it out, or give 2022 for older tools.")
    if names and form != "folder":
        raise ValueError(
            "--names is for folders: LoRA weights have the names of kohya's scripts, which old and new tools read, "
            "and a delta has lit-unlearn's own."
        )
    if form != "lora" and rank is not None:
        raise ValueError(f"rank={rank} is for LoRA weights: choose the format lora, or leave it out.")
