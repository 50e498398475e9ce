"""Measures what edits need in memory in the exact architectures of published models, beside what a plan predicts.

    python benchmarks/footprint.py sd1 sdxl --output docs/results/footprint.md
    python benchmarks/footprint.py sd35_medium --prompts 4         # its T5 takes 10 GB
    python benchmarks/footprint.py flux1_dev --computed            # nothing is run: 24 GB for the transformer alone

Weights are random, in bfloat16, and never on disk: the memory does not depend on their values. Parts are made in turn,
each phase in a process of its own, as with ``--model.offload true``; pictures are small. ``measured`` is the growth of
the process beyond its libraries, at its peak; ``predicted`` is counted on the meta device with the same settings, by
the code of ``lit-unlearn plan``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil

TOLERANCE = 0.25
"""Of a prediction, as a share of what is measured: what kernels need within themselves is not predicted."""
FLOOR = 0.15
"""GB that are within the tolerance at any size: pages of libraries that are read at the first call."""
KEYS = 15 * 77
RETAINED = 20 * 77


def phases_of(architecture: str) -> list[str]:
    """Names of the phases of an architecture."""
    from lit_unlearn.diffusion.described import DescribedModel

    base = DescribedModel.find(architecture)
    texts = [part for part in base.parts_with_weights() if part.startswith("text")]
    return [*(f"encode {part}" for part in texts), "predict", "descent", "decode", "solve tokens"]


def small(base: Any, side: int) -> Any:
    """The pipeline on the meta device, for latents with so many rows and columns."""
    import torch

    pipeline = base.pipeline(torch.bfloat16)
    if "sample_size" in pipeline.denoiser.config:
        pipeline.denoiser.register_to_config(sample_size=side)
    else:
        pipeline.sample_size = side
    return pipeline


def materialised(module: Any) -> Any:
    """The module with random weights in the processor's memory."""
    import torch

    block = torch.randn(1 << 20).mul_(0.02)

    def fill(value: Any) -> Any:
        new = torch.empty_like(value, device="cpu")
        flat = new.view(-1)
        if not value.is_floating_point():
            return torch.arange(len(flat)).view_as(new).to(new)  # ids of positions
        for part in flat.split(len(block)):
            part.copy_(block[: len(part)])
        return new

    return module._apply(fill)


def prepared(name: str, phase: str, prompts: int, side: int) -> tuple[int, Callable[[], Any]]:
    """The bytes that a plan predicts for a phase, and a function that runs it; on meta tensors until it is called."""
    import torch

    from lit_unlearn.diffusion import footprint
    from lit_unlearn.diffusion.condition import Condition
    from lit_unlearn.diffusion.described import DescribedModel
    from lit_unlearn.diffusion.text_ways import way_of
    from lit_unlearn.training.plan import solve_bytes

    base = DescribedModel.find(name)
    pipeline = small(base, side)
    sizes = {part: footprint.module_bytes(module) for part, module in pipeline.parts.items()}
    kind, _, part = phase.partition(" ")
    if kind == "encode":
        (text,) = (text for text in pipeline.texts if text.part == part)
        ids = torch.zeros(prompts, text.length, dtype=torch.long)

        def encode() -> None:
            materialised(text.model)
            with torch.no_grad():
                text.read(ids)

        return sizes[part] + footprint.encode_bytes(pipeline, prompts, part), encode
    if kind in ("predict", "descent"):
        denoiser = pipeline.denoiser_part
        trained = [weight for weight in base.names if way_of(weight) == "tokens"] if kind == "descent" else []
        count = 1 if kind == "descent" else 2
        more = footprint.descent_bytes(pipeline, count, trained, False) if trained else 0
        predicted = sizes[denoiser] + (more or footprint.predict_bytes(pipeline, count))
        condition = footprint.condition_of(pipeline, count)

        def predict() -> None:
            materialised(pipeline.denoiser)
            values = (condition.states, condition.pooled)
            given = Condition(*(None if one is None else torch.randn(one.shape, dtype=one.dtype) for one in values))
            x_t = torch.randn(count, *pipeline.latent_shape, dtype=torch.bfloat16)
            for weight in trained:
                pipeline.named_parameters()[weight].requires_grad_(True)
            with torch.set_grad_enabled(bool(trained)):
                output = pipeline.predict(x_t, torch.tensor(500), given)
            if trained:
                output.float().square().mean().backward()

        return predicted, predict
    if kind == "decode":

        def decode() -> None:
            materialised(pipeline.vae)
            with torch.no_grad():
                pipeline.vae.decode(torch.randn(1, *pipeline.latent_shape, dtype=torch.bfloat16))

        return sizes["vae"] + footprint.decode_bytes(pipeline, 1), decode
    maps = {weight: pipeline.linear(weight) for weight in base.names if way_of(weight) == part}
    inputs = next(iter(maps.values())).in_features
    outputs = sum(layer.out_features for layer in maps.values())

    def solve() -> None:
        from lit_unlearn.core.null_space_solver import NullSpace
        from lit_unlearn.core.solvers import Retained, Write

        kept = torch.randn(RETAINED, inputs, dtype=torch.float64)
        retained = Retained(kept.mT @ kept, RETAINED)
        keys = torch.randn(KEYS, inputs, dtype=torch.float64)
        goals = torch.randn(KEYS, inputs, dtype=torch.float64)
        solver = NullSpace(threshold=0.3, ridge=100)
        solver.prepare(dict.fromkeys(maps, retained), lambda calls: [call() for call in calls], torch.device("cpu"))
        writes = []
        for weight, layer in maps.items():
            old = torch.randn(layer.out_features, inputs, dtype=torch.float64)
            writes.append(Write(weight, old, torch.bfloat16, keys, goals @ old.mT, retained))
        solver.solve(writes)

    return solve_bytes(inputs, outputs, KEYS), solve


def measure(name: str, phase: str, prompts: int, side: int, run: bool) -> dict[str, float | None]:
    """Predict a phase and run it, in this process; GB and seconds."""
    predicted, call = prepared(name, phase, prompts, side)
    if not run:
        return {"predicted": predicted / 1e9, "measured": None, "seconds": None}
    from lit_unlearn.system.memory import peak_memory

    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    return {"predicted": predicted / 1e9, "measured": (peak_memory() - before) / 1e9, "seconds": seconds}


def in_a_process(name: str, phase: str, arguments: argparse.Namespace) -> dict[str, float | None]:
    """As ``measure``, in a process of its own."""
    options = ["--prompts", str(arguments.prompts), "--side", str(arguments.side)]
    command = [sys.executable, __file__, name, "--phase", phase, *options]
    command += ["--computed"] if arguments.computed else []
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def within(found: dict[str, Any]) -> bool:
    """Whether a prediction is within the tolerance of what was measured."""
    return abs(found["predicted"] - found["measured"]) <= max(FLOOR, TOLERANCE * found["measured"])


def main() -> None:
    """Measure or compute, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+", help="as in lit-unlearn plan --model: sd1, sdxl, sd35_medium, ...")
    parser.add_argument("--prompts", type=int, default=16, help="prompts encoded at once")
    parser.add_argument("--side", type=int, default=32, help="side of the latents: 32 for pictures of 256 pixels")
    parser.add_argument("--computed", action="store_true", help="run nothing: predictions alone")
    parser.add_argument("--output", default=None, help="Markdown file to append the tables to")
    parser.add_argument("--phase", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = arguments.prompts, arguments.side
    if arguments.phase is not None:
        print(json.dumps(measure(arguments.architectures[0], arguments.phase, *settings, not arguments.computed)))
        return
    threads = os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))
    for name in arguments.architectures:
        how = (
            "computed, nothing was run" if arguments.computed else f"{threads} thread(s), {platform.machine()}, no GPU"
        )
        lines = [
            f"## {name}",
            "",
            f"{date.today()}, {how}; bfloat16, {arguments.prompts} prompts, latents of {arguments.side} squared.",
            "",
            "| phase | predicted, GB | measured, GB | seconds |",
            "| --- | ---: | ---: | ---: |",
        ]
        print("\n".join(lines), flush=True)
        for phase in phases_of(name):
            found = in_a_process(name, phase, arguments)
            if found["measured"] is None:
                cells = [phase, f"{found['predicted']:.2f}", "", ""]
            else:
                mark = "" if within(found) else " (outside of the tolerance)"
                cells = [
                    phase,
                    f"{found['predicted']:.2f}",
                    f"{found['measured']:.2f}{mark}",
                    f"{found['seconds']:.0f}",
                ]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
        if arguments.output:
            with Path(arguments.output).open("a", encoding="utf-8") as file:
                file.write("\n".join(["", *lines]) + "\n")


if __name__ == "__main__":
    main()
