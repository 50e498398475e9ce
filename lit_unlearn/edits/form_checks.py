"""Which options an export takes together, without PyTorch: a mistake is told before that is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_unlearn.diffusion.lora_names import NAMINGS

Form = Literal["folder", "delta", "lora", "single"]
FORMS: tuple[Form, ...] = ("folder", "delta", "lora", "single")


def check_form(
    form: str,
    rank: int | str | None,
    dtype: str | None,
    names: str | None,
    single_file: str | Path | None,
    lora_names: str | None = None,
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
            "--names is for folders: those of LoRA weights are chosen with --lora_names, and a delta has lit-unlearn's "
            "own."
        )
    if form != "lora" and rank is not None:
        raise ValueError(f"rank={rank} is for LoRA weights: choose the format lora, or leave it out.")
    if lora_names is not None and lora_names not in NAMINGS:
        raise ValueError(f"lora_names={lora_names!r} is not one of {', '.join(NAMINGS)}.")
    if form != "lora" and lora_names is not None:
        raise ValueError(f"lora_names={lora_names} is for LoRA weights: choose the format lora, or leave it out.")


def check_push(push_to_hub: str | None, private: bool, licence: str | None) -> None:
    """Refuse options of an upload without one.

    Raises:
        ValueError: Which one, and what to do.
    """
    if not push_to_hub and (private or licence):
        option = "private" if private else "license"
        raise ValueError(f"--{option} is for --push_to_hub OWNER/NAME: give that too, or leave it out.")
