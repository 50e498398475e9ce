"""Measures the embedded model: its judge on drawings and reconstructions, generated pictures per concept, and speed.

    python benchmarks/emoji_sd.py --output docs/results/emoji_sd.json --samples checkpoints/emoji-sd/samples.png

Generated pictures use seeds that are not used elsewhere. It takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse

import torch

from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.emoji.figures import figures_of_parts, figures_of_pictures
from lit_unlearn.evaluation.grids import image_grid
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.pixels import save_png


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

    result |= figures_of_parts(components, judge, arguments.drawings)
    sampler = arguments.num_inference_steps, arguments.guidance_scale
    found, rows = figures_of_pictures(components, judge, *sampler, arguments.images_per_prompt)
    result |= found
    for key, value in result.items():
        print(key, value)
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.samples:
        grid = image_grid([torch.stack(row) for row in rows.values()], row_labels=list(rows), scale=2)
        save_png(arguments.samples, grid)


if __name__ == "__main__":
    main()
