"""Pictures per second beside a plain loop over diffusers' pipeline, and how far the pictures are from its own.

    OMP_NUM_THREADS=1 python benchmarks/pictures.py --output docs/results/pictures.md
    python benchmarks/pictures.py --device cuda --model FOLDER --prompts "a dog" "a castle" --steps 50 --guidance 7.5

Both sides draw the same prompts from the same seeds with the same sampler, steps and guidance, in turn, each batch size
of its own, and the best of all repeats counts: seconds of the processor, since other programs may run; on a GPU, of the
wall. The plain loop is ``StableDiffusionPipeline`` as its documentation shows it, without a safety checker and progress
bar, in float32. Ours is what ``generate`` and ``test`` call: in float32, with weights in bfloat16 (``--model.dtype
bfloat16``), and in float32 under autocast (``--trainer.precision bf16-mixed``). ``--compile`` adds the first two with
``--model.torch_compile true``; kernels are made before the clock starts.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = ("a dog", "a castle", "a dog in the rain", "a sketch of an owl", "a man surfing", "an apple at sunset")


Draw = Callable[[list[str], list[int], int], Tensor]
"""From prompts, seeds and how many are drawn at once to pictures (n, 3, H, W), float32 on the CPU."""


def plain(model: str, device: torch.device, steps: int, guidance: float) -> Draw:
    """Draws as the documentation of diffusers does, one call for each batch."""
    from diffusers import StableDiffusionPipeline

    from lit_unlearn.diffusion.source import resolve_model

    pipeline = StableDiffusionPipeline.from_pretrained(str(resolve_model(model)), safety_checker=None).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def batch_of(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = {"generator": generators, "num_inference_steps": steps, "guidance_scale": guidance}
        return pipeline(prompts, output_type="pt", **given).images.float().cpu()

    def draw(prompts: list[str], seeds: list[int], batch: int) -> Tensor:
        parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)]
        return torch.cat([batch_of(prompts[part], seeds[part]) for part in parts])

    return draw


def ours(
    model: str,
    device: torch.device,
    steps: int,
    guidance: float,
    dtype: torch.dtype,
    mixed: bool,
    compiled: bool = False,
) -> Draw:
    """Draws as ``generate`` does, and as a test does: one call, which reads the empty prompt once for all batches."""
    from lit_unlearn.diffusion.compiled import compile_drawing
    from lit_unlearn.diffusion.load import load_pipeline

    pipeline = load_pipeline(model, dtype, device=device)
    if compiled:
        compile_drawing(pipeline)

    def draw(prompts: list[str], seeds: list[int], batch: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            return pipeline.draw(prompts, seeds, steps, guidance, batch).float()

    return draw


def drawn(draw: Draw, prompts: list[str], batch: int, device: torch.device) -> tuple[float, Tensor]:
    """Seconds and pictures (n, 3, H, W) of ``prompts``, ``batch`` at once, with the seeds 0, 1, ..."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    pictures = draw(prompts, list(range(len(prompts))), batch)
    return clock() - started, pictures  # these are on the CPU: nothing is left to wait for


def table(known: dict[tuple[str, int], list[float]], far: dict[str, Tensor], pictures: int) -> list[str]:
    """The results in Markdown."""
    lines = [
        "| | batch | pictures a second | **time, of the plain loop's** | largest difference | mean difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, batch), seconds in known.items():
        ratio = min(seconds) / min(known["diffusers, float32", batch])
        off = far[name]
        lines.append(
            f"| {name} | {batch} | {pictures / min(seconds):.2f} | {ratio:.2f} | {off.max():.1e} | {off.mean():.4f} |"
        )
    return lines


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="a model of Stable Diffusion 1 or 2")
    parser.add_argument("--device", default=None)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also draw with torch.compile")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    from lit_unlearn.system.devices import device_name, find_device

    device = find_device(arguments.device)
    prompts = list(itertools.islice(itertools.cycle(arguments.prompts), arguments.pictures))
    given: tuple[Any, ...] = (arguments.model, device, arguments.steps, arguments.guidance)
    sides = {
        "diffusers, float32": plain(*given),
        "lit-unlearn, float32": ours(*given, torch.float32, False),
        "lit-unlearn, weights in bfloat16": ours(*given, torch.bfloat16, False),
        "lit-unlearn, bf16-mixed": ours(*given, torch.float32, True),
    }
    if arguments.compile:
        sides["lit-unlearn, float32, compiled"] = ours(*given, torch.float32, False, True)
        sides["lit-unlearn, weights in bfloat16, compiled"] = ours(*given, torch.bfloat16, False, True)
    known: dict[tuple[str, int], list[float]] = {}
    far: dict[str, Tensor] = {}
    for batch in arguments.batches:
        for draw in sides.values():
            draw(prompts[:batch], list(range(len(prompts[:batch]))), batch)  # the first call allocates
        for _ in range(arguments.repeats):
            first: Tensor | None = None
            for name, draw in sides.items():
                seconds, found = drawn(draw, prompts, batch, device)
                known.setdefault((name, batch), []).append(seconds)
                first = found if first is None else first
                off = (found - first).abs()
                far[name] = off if name not in far else torch.maximum(far[name], off)
    lines = [
        f"{date.today()}, {device_name(device)}, {platform.machine()}, {torch.get_num_threads()} thread(s), PyTorch "
        f"{torch.__version__}; {arguments.model}, {arguments.pictures} pictures, {arguments.steps} steps, guidance "
        f"{arguments.guidance:g}, best of {arguments.repeats}.",
        "",
        *table(known, far, arguments.pictures),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(f"# Pictures per second\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
