"""Several edits of one model, side by side: what they agree on, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.checkpoint import Edit


def one_base(edits: Sequence[Edit], model: str | None, revision: str | None, config_folder: str | None) -> BaseModel:
    """The model that all ``edits`` edit; arguments as for ``chosen_base``.

    Raises:
        ValueError: They edit different models, or with different clip skip; or as ``chosen_base``.
    """
    bases = [chosen_base(model, revision, edit, config_folder) for edit in edits]
    if len({base.place for base in bases}) > 1:
        names = ", ".join(dict.fromkeys(base.name for base in bases))
        raise ValueError(f"The runs edit different models ({names}): compare edits of one model.")
    if len({edit.clip_skip for edit in edits}) > 1:
        skips = ", ".join(sorted({"none" if edit.clip_skip is None else str(edit.clip_skip) for edit in edits}))
        raise ValueError(f"The runs have clip_skip {skips}, which draw otherwise: compare edits of one clip_skip.")
    return bases[0]


def agreed(edits: Sequence[Edit], field: str, given: float | None) -> float:
    """The value that is given, or that of the runs.

    Raises:
        ValueError: The runs have different values, and none is given.
    """
    values = {
        edit.hyper_parameters.get(field, {"num_inference_steps": 15, "guidance_scale": 4.0}[field]) for edit in edits
    }
    if given is None and len(values) > 1:
        raise ValueError(f"The runs have {field} {', '.join(map(str, sorted(values)))}: choose one with --{field}.")
    return float(values.pop() if given is None else given)


def titles_of(edits: Sequence[Edit]) -> list[str]:
    """A heading for each edit: method and concepts, and the file where two have the same."""
    methods = [str((edit.recipe or {}).get("method") or edit.method) for edit in edits]
    named = [f"{name}: {', '.join(edit.concepts) or 'nothing'}" for name, edit in zip(methods, edits, strict=True)]
    twice = Counter(named)
    return [name if twice[name] == 1 else f"{name} ({edit.path})" for name, edit in zip(named, edits, strict=True)]
