"""Writes an edit in the form that is asked for; ``export`` and ``lit_unlearn.export`` call this.

Data flow: arguments and the output are checked; the edit is read and its base model is found; the writer of the form
(``edits.export``) writes it with its provenance.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import how_to_draw
from lit_unlearn.diffusion.kept import Kept
from lit_unlearn.diffusion.lora_names import Naming
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.card import left_out
from lit_unlearn.edits.checkpoint import Edit, read_edit, warn_unfinished
from lit_unlearn.edits.dtypes import DTYPES
from lit_unlearn.edits.export import (
    export_delta,
    export_lora,
    export_pipeline,
    export_single,
    output_path,
    provenance,
)
from lit_unlearn.edits.form_checks import Form, check_form
from lit_unlearn.edits.lora import FILE_NAME, notable_loss, parse_rank
from lit_unlearn.edits.single_file import SingleFile, Written
from lit_unlearn.system.errors import plain_warnings, user_errors


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder or the file.
        edit: The edit.
        base: Its base model.
        kept: What a folder has from the base besides its parts, and what was left out.
        report: Rank and residuals of LoRA weights.
        written: What a single file has got.
    """

    path: Path
    edit: Edit
    base: BaseModel
    kept: Kept | None = None
    report: dict[str, Any] | None = None
    written: Written | None = None

    def lines(self) -> list[str]:
        """What to say about it."""
        said = [f"{self.path}: {self.base.name} without {', '.join(self.edit.concepts) or 'what it has unlearned'}"]
        if how := how_to_draw(self.base.family, self.edit.clip_skip, self.base.names):
            said.append(f"{how}: an export does not hold it")
        if self.kept is not None:
            said += [f"not taken over from the base: {line}" for line in left_out(self.kept.left_out)]
        if self.written is not None:
            said += self.written.lines()
        if self.report is not None:
            said.append(f"rank {self.report['rank']}; part of each layer's change that is missing:")
            said += [f"  {name:60} {residual:.2e}" for name, residual in self.report["residual"].items()]
        return said


def export_edit(
    ckpt_path: str | Path,
    output: str | Path,
    form: Form = "folder",
    *,
    rank: int | str | None = None,
    lora_names: Naming | None = None,
    dtype: str | None = None,
    names: str | None = None,
    single_file: str | Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    config_folder: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write an edit.

    Args:
        ckpt_path: A run's checkpoint, or a delta.
        output: Folder or file to write.
        form: ``folder`` (a whole diffusers folder), ``delta`` (the changed weights), ``lora``, or ``single`` (a copy
            of the model's single file).
        rank: Largest rank of LoRA weights; None or ``auto`` for the rank that they need, ``exact`` for no loss.
        lora_names: Names of LoRA weights: ``diffusers`` for its own; None or ``kohya`` for those that UIs read too.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the run's.
        names: ``2022`` for a folder with the older names of the text encoder's weights.
        single_file: The model's single file, to copy; None for the edited model, if it was one.
        model: The base model; None for the one that was edited.
        revision: Branch, tag or commit, if the model is a hub id.
        config_folder: Folder with what a single file does not hold, as for ``BaseModel.find``.
        overwrite: Replace an earlier export.

    Raises:
        UserError: An argument, the checkpoint or the model is wrong, or the output exists.
        OSError: The output cannot be written.
    """
    with user_errors(), plain_warnings():
        kind = _checked_dtype(dtype)
        check_form(form, rank, dtype, names, single_file, lora_names)
        lora_rank = parse_rank(str(rank)) if form == "lora" and rank is not None else None
        source = SingleFile(single_file) if single_file else None
        edit = base = None
        if form == "single" and source is None:  # the model that was edited, if it is a single file
            edit = read_edit(ckpt_path)
            base = chosen_base(model, revision, edit, config_folder)
            source = SingleFile(single_file_of(base))
        file_name = {"delta": "delta.safetensors", "lora": FILE_NAME}.get(form)
        path = output_path(Path(output), source.path.name if source is not None else file_name, overwrite)
        edit = edit or read_edit(ckpt_path)
        if source is not None:
            for name in edit.weights:
                source.dtype(name)  # a file without a place for it is refused before the model is read
        warn_unfinished(ckpt_path)
        base = base or chosen_base(model, revision, edit, config_folder)
        if form == "delta":
            export_delta(edit, provenance(edit, base), path, kind)
            return Exported(path, edit, base)
        if form == "lora":
            report = export_lora(edit, provenance(edit, base), base, path, lora_rank, kind, lora_names or "kohya")
            if loss := notable_loss(report):
                warnings.warn(loss, stacklevel=1)
            return Exported(path, edit, base, report=report)
        if source is not None:
            written = export_single(edit, provenance(edit, base), base, source, path, overwrite)
            return Exported(path, edit, base, written=written)
        return Exported(path, edit, base, kept=export_pipeline(edit, base, path, kind, names == "2022"))


def single_file_of(base: BaseModel) -> Path:
    """The single file that the edited model is.

    Raises:
        ValueError: It is a folder or a model of the hub.
    """
    if base.single_file is None:
        raise ValueError(
            f"--format single needs --single_file FILE: model={base.name!r} is no single file, and the edit is written "
            "into a copy of one."
        )
    return base.single_file


def _checked_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    return None if dtype is None else getattr(torch, dtype)
