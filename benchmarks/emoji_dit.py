"""Measures emoji-dit: the share of pictures of each concept's prompts in which the two judges see the concept.

    python benchmarks/emoji_dit.py --model logs/emoji/dit/version_0/pretrained

Drawn by diffusers' own pipeline with seeds that are not used elsewhere. It takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from lit_unlearn.emoji.dit import draw
from lit_unlearn.emoji.figures import figures_of_pictures
from lit_unlearn.evaluation.grids import image_grid
from lit_unlearn.judges.emoji import EmojiJudge, SecondEmojiJudge
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.pixels import save_png


class Drawn:
    """Draws with diffusers' pipeline, and keeps the pictures for a second judge."""

    def __init__(self, model: str, without_t5: bool, max_sequence_length: int | None) -> None:
        parts = {"text_encoder_3": None} if without_t5 else {}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(model, local_files_only=True, **parts)
        self.max_sequence_length = max_sequence_length
        self.pictures: list[Tensor] = []

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, guidance_scale: float
    ) -> Tensor:
        made = draw(self.pipeline, prompts, seeds, num_inference_steps, guidance_scale, self.max_sequence_length)
        self.pictures.append(made)
        return made


class Again:
    """Returns pictures that were drawn before, in the same order."""

    def __init__(self, pictures: list[Tensor]) -> None:
        self.pictures = iter(pictures)

    def draw(self, *_: object) -> Tensor:
        return next(self.pictures)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the pipeline")
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--without_t5", action="store_true", help="draw without the T5 encoder")
    parser.add_argument("--max_sequence_length", type=int, default=None, help="positions of T5; default: its own")
    parser.add_argument("--output", default=None)
    parser.add_argument("--samples", default=None)
    arguments = parser.parse_args()

    drawn = Drawn(arguments.model, arguments.without_t5, arguments.max_sequence_length)
    sampler = {k: getattr(arguments, k) for k in ("num_inference_steps", "guidance_scale")}
    settings = (arguments.num_inference_steps, arguments.guidance_scale, arguments.images_per_prompt)
    found, rows = figures_of_pictures(drawn, EmojiJudge(), *settings)
    second, _ = figures_of_pictures(Again(drawn.pictures), SecondEmojiJudge(), *settings)
    shares = ("per_concept", "direct", "indirect")
    result = {"sampler": sampler, **found, "second_judge": {key: second[key] for key in shares}}
    for name, share in found["per_concept"].items():
        print(f"{name:12}", *(f"{share[kind]:.3f} ({second['per_concept'][name][kind]:.3f})" for kind in share))
    for kind in ("direct", "indirect"):
        print(kind, found[kind], "second judge", second[kind])
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.samples:
        grid = image_grid([torch.stack(row) for row in rows.values()], row_labels=list(rows), scale=2)
        save_png(arguments.samples, grid)


if __name__ == "__main__":
    main()
