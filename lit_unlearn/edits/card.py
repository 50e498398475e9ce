"""The model card of an export."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lit_unlearn.diffusion.clip_skip import lines_before_a_call
from lit_unlearn.diffusion.kept import PROVENANCE
from lit_unlearn.edits.chain import title_of

SHOWN = 5
"""Maximum number of names in a line about files that are left out."""


def left_out(kept: Mapping[str, str]) -> list[str]:
    """One line for each reason why files or parts of the base are not in an export.

    Args:
        kept: The reason for each name, as ``Kept.left_out``.
    """
    by_reason = defaultdict(list)
    for name, reason in kept.items():
        by_reason[reason].append(name)
    return [
        f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}: {reason}"
        for reason, names in by_reason.items()
    ]


USES = {
    "folder": """pipeline = DiffusionPipeline.from_pretrained("{name}")""",
    "lora": """pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{name}")""",
    "delta": """pipeline = DiffusionPipeline.from_pretrained("{base}")
for weight, value in load_file(hf_hub_download("{name}", "{file}")).items():{skip}
    part, _, rest = weight.partition(".")
    getattr(pipeline, part).get_parameter(rest).data.copy_(value)""",
    "single": """# {file} is a whole checkpoint in the layout of the original code, for ComfyUI, web UIs, and
# the from_single_file of a diffusers pipeline of its family.""",
}
"""How each form is loaded."""
SKIP = """
    if weight.startswith("overwritten."):  # what an earlier edit had left, for `lit-unlearn undo`
        continue"""
"""Comes into the loop over the tensors of a delta of several edits."""
IMPORTS = {
    "folder": "from diffusers import DiffusionPipeline",
    "lora": "from diffusers import DiffusionPipeline",
    "delta": """from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file""",
    "single": "",
}


def model_card(
    facts: Mapping[str, Any],
    name: str,
    *,
    form: str = "folder",
    file: str = "",
    licence: str | None = None,
    pictures: str | None = None,
) -> str:
    """Return the README of an export, for people and for the hub.

    Args:
        facts: Its provenance.
        name: Its name, or that of its repository.
        form: ``folder``, ``delta``, ``lora`` or ``single``.
        file: Name of its file, unless it is a folder.
        licence: Identifier for the field ``license``; None leaves it out.
        pictures: Name of a picture to show; None for none.
    """
    concepts = ", ".join(facts["concepts"])
    removed = f"the concept {concepts} was removed" if concepts else "training pictures were unlearned"
    base = f"base_model: {facts['base_model']}\n" if facts["base_model"].count("/") == 1 else ""  # a hub id
    licensed = f"license: {licence}\n" if licence else ""
    shown = f"![Pictures before and after the edit]({pictures})\n\n" if pictures else ""
    chain = [title_of(link["concepts"], link["method"]) for link in facts.get("chain") or ()]
    drawn = (
        f"It was edited for prompts read earlier in the text encoder: {how}.\n" if (how := facts.get("drawing")) else ""
    )
    stacked = f"These edits lie on top of each other, the first one first: {'; '.join(chain)}.\n" if chain else ""
    lines = [f"- {line}" for line in left_out(facts.get("left_out", {}))]
    missing = "\n".join(["## Not taken over from the base model", "", *lines, "", ""]) if lines else ""
    scores = facts["scores"]
    table = "Not measured.\n"
    if scores:
        before = scores["before"] or {}
        rows = [
            f"| {label} | {_number(before.get(key))} | {_number(scores[key])} |"
            for key, label in (("forget", "forget"), ("retain", "retain"), ("harmonic_mean", "harmonic mean"))
        ]
        table = "\n".join(["| | before | after |", "| --- | ---: | ---: |", *rows]) + (
            f"\n\nJudge {scores['judge']}, concept set {scores['concepts']['name']}, "
            f"{scores['images_per_concept']} pictures per concept.\n"
        )
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-unlearning, lit-unlearn]
{base}{licensed}---
# {name}: {facts["base_model"]} without {concepts or "some training pictures"}

A text-to-image model from which {removed} with lit-unlearn {facts["lit_unlearn"]}
({facts["method"]}). {len(facts["edited_weights"])} weights differ from those of the base model, whose licence applies.
{stacked}{drawn}Removal is not perfect, and what was not tested may have changed: see the scores.

{shown}{_use(facts, name, form, file)}
## Scores

Forget: share of the pictures for prompts of the removed concept that do not show it. Retain: share of the pictures for
other concepts' prompts that show theirs.

{table}
{missing}{_where(form, file)} has everything but the base model that it takes to make this again.
"""


def _use(facts: Mapping[str, Any], name: str, form: str, file: str) -> str:
    """The block of Python that loads it and draws a picture."""
    skip = SKIP if facts.get("chain") else ""
    lines = USES[form].format(name=name, base=facts["base_model"], file=file, skip=skip)
    skipped = facts.get("clip_skip")
    if form != "single":
        lines += lines_before_a_call(facts["base_sha256"]) if skipped else ""
        option = f", clip_skip={skipped}" if skipped else ""
        lines += f'\npipeline("a picture of a castle"{option}).images[0].save("castle.png")'
    return "\n".join(["```python", *([IMPORTS[form], ""] if IMPORTS[form] else []), lines, "```", ""])


def _where(form: str, file: str) -> str:
    return f"`{PROVENANCE}`" if form == "folder" else f"The metadata of `{file}`"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
