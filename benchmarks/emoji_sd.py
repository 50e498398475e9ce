"""Measures the embedded model: its judge on drawings and reconstructions, generated pictures per concept, and speed.

    python benchmarks/emoji_sd.py --output docs/results/emoji_sd.json --samples checkpoints/emoji-sd/samples.png

Generated pictures use seeds that are not used elsewhere. It takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
from torch import Tensor

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import PictureItem, Pictures
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.emoji.data import DrawingDataset
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.evaluation.grids import image_grid
from lit_unlearn.judges.base import judge_questions
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.pixels import save_png

FRESH_SEED = 7_000_000


@torch.no_grad()
def judge_accuracy(judge: ClassifierJudge, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy per head on ``images`` (B, 3, H, W) in [-1, 1]."""
    logits = judge.classifier(images)
    return {
        name: (logits[name].argmax(dim=-1) == labels[:, i]).float().mean().item() for i, name in enumerate(ATTRIBUTES)
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--judge", default=None, help="folder of the judge; default: beside the model")
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--drawings", type=int, default=2560)
    parser.add_argument("--output", default=None)
    parser.add_argument("--samples", default=None)
    arguments = parser.parse_args()

    components = load_pipeline(arguments.model)
    judge = ClassifierJudge(arguments.judge or f"{resolve_model(arguments.model)}/judge")
    result: dict[str, object] = {
        "sampler": {k: getattr(arguments, k) for k in ("num_inference_steps", "guidance_scale")}
    }

    data = DrawingDataset(arguments.drawings, "validation", seed=1)
    items = [data[i] for i in range(len(data))]
    images, labels = torch.stack([i["images"] for i in items]), torch.stack([i["labels"] for i in items])
    with torch.no_grad():
        latents = torch.cat([components.vae.encode(part).latent_dist.mode() for part in images.split(64)])
        decoded = torch.cat([components.vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
    result["drawings"] = judge_accuracy(judge, images, labels)
    result["reconstructions"] = judge_accuracy(judge, decoded, labels)
    result["psnr_db"] = (10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3)))).mean().item()

    concepts = load_concept_set("emoji20")
    pictures = Pictures(concepts, arguments.images_per_prompt, FRESH_SEED).items
    shown: dict[str, list[float]] = defaultdict(list)
    rows: dict[str, list[tuple[PictureItem, Tensor]]] = defaultdict(list)
    names = list(concepts.concepts)
    started = time.perf_counter()
    for start in range(0, len(pictures), 40):
        batch = pictures[start : start + 40]
        made = components.draw(
            [item.prompt for item in batch],
            [item.seed for item in batch],
            arguments.num_inference_steps,
            arguments.guidance_scale,
        )
        answers = judge_questions(judge, made, [item.question for item in batch])
        for item, answer, picture in zip(batch, answers.tolist(), made, strict=True):
            concept = names[item.concept_index]
            kind = "direct" if item.prompt_index < concepts.counts.direct else "indirect"
            shown[f"{concept}/{kind}"].append(float(answer >= 0.5))
            if item.image_index == 0:
                rows[concept].append((item, picture))
    seconds = time.perf_counter() - started
    share = {key: sum(values) / len(values) for key, values in shown.items()}
    result["per_concept"] = {n: {k: share[f"{n}/{k}"] for k in ("direct", "indirect")} for n in names}
    for kind in ("direct", "indirect"):
        values = [share[f"{n}/{kind}"] for n in names]
        result[kind] = {"mean": sum(values) / len(values), "least": min(values)}
    result["seconds_per_20_pictures"] = 20 * seconds / len(pictures)
    result["pictures"] = len(pictures)
    for key, value in result.items():
        print(key, value)
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.samples:
        grid = image_grid([torch.stack([p for _, p in rows[name]]) for name in names], row_labels=names, scale=2)
        save_png(arguments.samples, grid)


if __name__ == "__main__":
    main()
