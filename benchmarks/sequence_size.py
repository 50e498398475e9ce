"""Time and memory of the closed form for up to 100 concepts at the sizes of Stable Diffusion 1.4.

    python benchmarks/sequence_size.py --output docs/results/sequence_size.md

A sequence of edits is solved anew from the keys of all concepts so far, so its last step costs as much as editing all
at once. Weights and keys are random, since only their sizes matter: 15 pairs of 77 positions a concept, and as many
retained prompts as there are other concepts' pairs in a set of 120. Nothing is said about how much is forgotten.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.system.memory import peak_memory

POSITIONS, PAIRS = 77, 15
SITES = {
    "the last text layer's fc2": [(768, 3072)],
    "keys and values of the cross-attention": [(size, 768) for size in (320, 640, 1280) for _ in range(10)]
    + [(1280, 768)] * 2,
}
"""Sizes (d_out, d_in) of the edited maps of each recipe: 1, and 32."""
SOLVERS = {
    "the last text layer's fc2": NullSpace(threshold=0.01, ridge=100.0),
    "keys and values of the cross-attention": NullSpace(rule="soft", threshold=0.03, ridge=None, forget_unused=True),
}


def keys_of(count: int, d_in: int, seed: int) -> torch.Tensor:
    """Random keys (count, d_in), float32, whose directions differ in energy as those of a text encoder do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d_in, generator=generator) * torch.logspace(0, -2, d_in)


def measured(site: str, concepts: int) -> tuple[float, float, float]:
    """Seconds of the processor for the null space and for all solves, and MB that they need beyond the keys."""
    solver, shapes = SOLVERS[site], SITES[site]
    d_in, count = shapes[0][1], concepts * PAIRS * POSITIONS
    keys, goals = keys_of(count, d_in, 1), keys_of(count, d_in, 2)
    moment = sum(
        second_moment(keys_of(8 * POSITIONS, d_in, 100 + part)) for part in range((120 - concepts) * PAIRS // 8)
    )
    retained = Retained(torch.as_tensor(moment), (120 - concepts) * PAIRS * POSITIONS)
    names = [str(number) for number in range(len(shapes))]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before, started = peak_memory(), time.process_time()
    solver.prepare(dict.fromkeys(names, retained), lambda calls: [call() for call in calls], torch.device("cpu"))
    prepared = time.process_time() - started
    for name, (d_out, _) in zip(names, shapes, strict=True):
        weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        solver.solve([Write(name, weight, torch.float32, keys, None, retained, anchors=goals, shared=len(names) > 1)])
    return prepared, time.process_time() - started - prepared, (peak_memory() - before) / 1e6


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", type=int, default=[1, 20, 100])
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Many concepts at the size of Stable Diffusion 1.4",
        "",
        "By `python benchmarks/sequence_size.py`, one thread, random weights and keys: seconds of the processor and",
        "memory of the closed form alone, whose values are the outputs of the target prompts' states. A step of a",
        "sequence costs what editing all concepts so far at once costs. Random weights say nothing about forgetting.",
        "",
        "| | concepts | keys | null space, s | solves, s | memory beside the keys, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines[-2:]), flush=True)
    for site in SITES:
        for concepts in arguments.concepts:
            prepared, solved, memory = measured(site, concepts)
            keys = concepts * PAIRS * POSITIONS
            lines.append(f"| {site} | {concepts} | {keys:,} | {prepared:.1f} | {solved:.1f} | {memory:,.0f} |")
            print(lines[-1], flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
