"""Every recipe that ships, as a command line that is done in seconds.

A new method is covered as soon as its recipe lies in ``configs``: what makes a recipe long has the same names in all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers import CONFIGS
from lit_unlearn.emoji.dit_text import DiTTextTraining

CONTENT: dict[str, dict[str, Any]] = {
    path.relative_to(CONFIGS).with_suffix("").as_posix(): yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(CONFIGS.rglob("*.yaml"))
}
COMPLETE = [name for name, content in CONTENT.items() if "class_path" in content.get("model", {})]
TRAININGS = [name for name in COMPLETE if name.startswith("emoji/")]
EDITS = [name for name in COMPLETE if name not in TRAININGS]
UNLEARNINGS = [name for name in EDITS if CONTENT[name]["data"]["class_path"] == "KeepForgetImages"]

FEW = {
    "trainer": {"max_epochs": 1, "max_steps": 2, "precision": "32-true"},
    "model": {
        "num_inference_steps": 1,
        "rounds": 1,
        "images": 2,
        "num_images": 2,
        "anchor_inference_steps": 1,
        "num_chain_steps": 2,
        "chains": 1,
        "images_per_phrase": 2,
        "noises_per_prompt": 1,
        "width": 8,
        "hidden_size": 16,
        "num_heads": 2,
        "num_layers": 1,
        "hidden_sizes": "[16,16,32]",
        "depths": "[2,2,1]",
        "attention_heads": "[2,2,2]",
        "block_out_channels": "[16,32]",
    },
    "data": {
        "batch_size": 2,
        "steps": 2,
        "images_per_prompt": 1,
        "steps_per_epoch": 2,
        "num_validation": 2,
        "drawings": 1,
        "captions": 1,
        "sample_prompts": "[a dog]",
        "prompts_per_kind": 0,
        "same_caption": 1,
        "others": 0,
        "held_out": 1,
    },
}
"""What replaces a recipe's numbers, for those of them that the recipe has and that are not null."""

SMOOTH = {"model.init_args.optimizer.init_args.lr": 1e-2, "model.init_args.optimizer.init_args.eps": 1e-2}
"""Of recipes with an optimizer, all of them kinds of Adam.

It divides by the size of the gradient, so it makes whole steps of gradients that are nothing but rounding, and on GPUs
PyTorch adds up in another order. A small step of a large gradient could not be told from rounding either.
"""


@dataclass
class Stock:
    """What the commands are given; nothing is written to any of it.

    Attributes:
        model: A tiny pipeline.
        judge: A judge of random weights that knows the questions of ``concepts``.
        concepts: A concept set of two concepts.
        more_concepts: The same with two others, for methods that balance them.
        keep_forget: Folders of pictures.
    """

    model: Path
    judge: Path
    concepts: Path
    more_concepts: Path
    keep_forget: dict[str, str]


def write_concepts(path: Path, concepts: dict[str, Any]) -> Path:
    """A concept set of ``concepts``, as ``pets``."""
    counts = {"direct": 1, "indirect": 1, "edit": 2}
    content = {"name": path.stem, "prompts_per_concept": counts, "concepts": concepts}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def more(concepts: dict[str, Any], *names: str) -> dict[str, Any]:
    """``concepts`` and others called ``names``."""
    added = {
        name: {
            "kind": "object",
            "target": "lemon",
            "anchor": "a thing",
            "question": f"Is there a {name}?",
            "direct": [f"one {name}"],
            "indirect": [f"that which is {place}"],
            "edit_prompts": [f"a {name}", f"the {name} at sunset"],
            "target_prompts": ["a lemon", "the lemon at sunset"],
        }
        for place, name in zip(("first", "second"), names, strict=True)
    }
    return {**concepts, **added}


ANSWERS = {
    "dog": ("subject", "dog"),
    "cat": ("style", "cartoon"),
    "owl": ("scene", "rain"),
    "castle": ("scene", "neon"),
}
"""What a judge of drawings is asked instead of whether a picture shows a concept."""


def teach(judge: Path, concepts: dict[str, Any]) -> None:
    """Have a judge of random weights answer the questions of ``concepts``.

    It sees a dog and a cat in every picture, so that rounding decides no verdict; pictures are compared on their own.
    """
    config = json.loads((judge / "config.json").read_text(encoding="utf-8"))
    weights = load_file(judge / "model.safetensors")
    for name, concept in concepts.items():
        attribute, value = config["questions"][concept["question"]] = ANSWERS[name]
        if name in ("dog", "cat"):
            weights[f"heads.{attribute}.bias"][config["attributes"][attribute].index(value)] += 100
    (judge / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, judge / "model.safetensors")


def small(name: str, stock: Stock, **given: Any) -> list[str]:
    """Arguments of the recipe ``name`` for a run of a step or two on ``stock``.

    Args:
        name: Without the suffix.
        stock: What it works on.
        **given: Replaces more of the recipe: ``model__rounds=2``.
    """
    content = CONTENT[name]
    args = ["--config", str(CONFIGS / f"{name}.yaml")]
    values: dict[str, Any] = {}
    for part, numbers in FEW.items():
        has = content[part] if part == "trainer" else content[part].get("init_args") or {}
        prefix = part if part == "trainer" else f"{part}.init_args"
        values |= {f"{prefix}.{key}": value for key, value in numbers.items() if has.get(key) is not None}
    if content["model"].get("init_args", {}).get("values", "refined") != "refined":  # there is no descent
        del values["data.init_args.steps"]
    if name in TRAININGS:
        values |= {"trainer.log_every_n_steps": 1}
        if "text_encoders" in content["model"]["init_args"]:
            values |= {"model.init_args.text_encoders": "text"}
    else:
        values |= on_stock(name, stock)
    if "optimizer" in content["model"].get("init_args", {}):
        values |= SMOOTH
    values |= {"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"}
    values |= {key.replace("__", ".init_args.", 1) if "__" in key else key: value for key, value in given.items()}
    return [*args, *(f"--{key}={value}" for key, value in values.items())]


def on_stock(name: str, stock: Stock) -> dict[str, Any]:
    """What a recipe that edits a model works on."""
    values = {"model.init_args.model": stock.model, "model.init_args.judge": stock.judge}
    if name in UNLEARNINGS:
        return {**values, **{f"data.init_args.{field}": folder for field, folder in stock.keep_forget.items()}}
    balances = "attributes" in CONTENT[name]["model"]["init_args"]
    values |= {"concept": "dog", "model.init_args.concept_set": stock.more_concepts if balances else stock.concepts}
    return {**values, "model.init_args.attributes": "[owl,castle]"} if balances else values


def prepare(name: str, stock: Stock, folder: Path) -> None:
    """Put into ``folder`` what a training of the embedded model finds there."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in TRAININGS:
        shutil.copytree(stock.model, folder / "checkpoints" / "emoji-sd", dirs_exist_ok=True)
    if name == "emoji/dit":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = DiTTextTraining(hidden_sizes=(16, 16, 32), depths=(2, 2, 1), attention_heads=(2, 2, 2))
            module.save_pretrained(folder / "text" / "pretrained")
