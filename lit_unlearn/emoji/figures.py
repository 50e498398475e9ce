"""Measurements of the embedded model: its judge, its autoencoder, and its pictures of every concept."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import PictureItem, Pictures
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.emoji.data import DrawingDataset
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.judges.base import Judge, judge_questions
from lit_unlearn.judges.classifier import ClassifierJudge

FRESH_SEED = 7_000_000
"""Seed of the first picture; nothing else uses these seeds."""
SHARE, DECIBELS, LEAST = 0.02, 1.0, 0.2
"""How much worse a new model may be: in share of right answers, in PSNR (dB), and in the share of its worst concept,
which has few pictures."""


@torch.no_grad()
def judge_accuracy(judge: ClassifierJudge, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy per head on ``images`` (B, 3, H, W) in [-1, 1] with the values ``labels`` (B, 3)."""
    logits = judge.classifier(images)
    return {
        name: (logits[name].argmax(dim=-1) == labels[:, i]).float().mean().item() for i, name in enumerate(ATTRIBUTES)
    }


@torch.no_grad()
def figures_of_parts(pipeline: Pipeline, judge: ClassifierJudge, drawings: int = 2560) -> dict[str, Any]:
    """The judge's accuracy on held-out drawings and on their reconstructions, and the reconstructions' PSNR in dB."""
    data = DrawingDataset(drawings, "validation", seed=1)
    items = [data[i] for i in range(len(data))]
    images, labels = torch.stack([i["images"] for i in items]), torch.stack([i["labels"] for i in items])
    vae: Any = pipeline.parts["vae"]
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
    return {
        "drawings": judge_accuracy(judge, images, labels),
        "reconstructions": judge_accuracy(judge, decoded, labels),
        # Pictures span [-1, 1], so the peak is 2.
        "psnr_db": (10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3)))).mean().item(),
    }


class Draws(Protocol):
    """What draws pictures (B, 3, H, W) in [0, 1] of prompts, as the families' pipelines do."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, guidance_scale: float
    ) -> Tensor:
        """Draw one picture for each prompt and seed."""


def figures_of_pictures(
    pipeline: Draws,
    judge: Judge,
    num_inference_steps: int,
    guidance_scale: float,
    images_per_prompt: int = 4,
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The share of pictures of the evaluation prompts of ``emoji20`` in which the judge sees the concept.

    Returns:
        The numbers; and the first picture (3, H, W) of each prompt, by concept.
    """
    concepts = load_concept_set("emoji20")
    pictures: list[PictureItem] = Pictures(concepts, images_per_prompt, FRESH_SEED).items
    shown: dict[str, list[float]] = defaultdict(list)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    names = list(concepts.concepts)
    started = time.perf_counter()
    for start in range(0, len(pictures), 40):
        batch = pictures[start : start + 40]
        prompts, seeds = [item.prompt for item in batch], [item.seed for item in batch]
        made = pipeline.draw(prompts, seeds, num_inference_steps, guidance_scale)
        answers = judge_questions(judge, made, [item.question for item in batch])
        for item, answer, picture in zip(batch, answers.tolist(), made, strict=True):
            concept = names[item.concept_index]
            kind = "direct" if item.prompt_index < concepts.counts.direct else "indirect"
            shown[f"{concept}/{kind}"].append(float(answer >= 0.5))
            if item.image_index == 0:
                rows[concept].append(picture)
    seconds = time.perf_counter() - started
    share = {key: sum(values) / len(values) for key, values in shown.items()}
    found: dict[str, Any] = {"per_concept": {n: {k: share[f"{n}/{k}"] for k in ("direct", "indirect")} for n in names}}
    for kind in ("direct", "indirect"):
        values = [share[f"{n}/{kind}"] for n in names]
        found[kind] = {"mean": sum(values) / len(values), "least": min(values)}
    return {**found, "seconds_per_20_pictures": 20 * seconds / len(pictures), "pictures": len(pictures)}, rows


def worse(found: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """One text for each number in ``found`` that is worse by more than chance than the same in ``published``."""
    behind = []
    for what in ("drawings", "reconstructions", "direct", "indirect"):
        for name, value in found.get(what, {}).items():
            if value < published.get(what, {}).get(name, 0.0) - (LEAST if name == "least" else SHARE):
                behind.append(f"{what} {name} {value:.1%} instead of {published[what][name]:.1%}")
    least = published.get("psnr_db", 0.0)
    if found.get("psnr_db", least) < least - DECIBELS:
        behind.append(f"PSNR {found['psnr_db']:.1f} dB instead of {published['psnr_db']:.1f}")
    return behind
