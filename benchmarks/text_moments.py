"""Measures what the moments and null spaces of wide text layers take, with random weights, in a process of their own.

    python benchmarks/text_moments.py                          # 4 layers of 10,240 inputs, 8 prompts of 64 tokens
    python benchmarks/text_moments.py --inputs 5120 --bound 99 # all moments at once, as where they fit
    python benchmarks/text_moments.py --inputs 5120 --prompts 100 --bound 0   # one layer at a time

A T5 encoder in bfloat16 reads the prompts, and each `wo` is edited within the null space of what it retains. The peak
is that of the process beyond the model and its libraries.
"""

from __future__ import annotations

import argparse
import resource
import time
from types import SimpleNamespace
from typing import Any

LENGTH = 64
EDITED = 20
WIDTH = 512


def measure(inputs: int, layers: int, prompts: int, bound: float | None) -> tuple[float, float, int, int]:
    """Peak in GB, seconds, number of groups, and number of layers that keep their keys."""
    import psutil
    import torch
    from transformers import T5Config, T5EncoderModel

    from lit_unlearn.core.null_space_solver import NullSpace
    from lit_unlearn.core.solvers import Write
    from lit_unlearn.diffusion.condition import Condition
    from lit_unlearn.diffusion.text import Tokens
    from lit_unlearn.methods.shared import moments
    from lit_unlearn.methods.shared.processes import Processes
    from lit_unlearn.methods.shared.retained_layers import RetainedLayers

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if bound is not None:
        moments.MOST_HELD_BYTES = round(bound * 1e9)
    config = T5Config(
        vocab_size=100, d_model=WIDTH, d_ff=inputs, num_layers=layers, num_heads=8, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config).bfloat16().eval()
    edited: dict[str, Any] = {
        f"text_encoder.encoder.block.{number}.layer.1.DenseReluDense.wo.weight": block.layer[1].DenseReluDense.wo
        for number, block in enumerate(model.encoder.block)
    }
    ids = torch.randint(1, 100, (prompts, LENGTH))
    text = SimpleNamespace(part="text_encoder", masked=False, causal=False, reads=lambda own: own >= 0)
    pipeline = SimpleNamespace(
        texts=(text,),
        tokenize=lambda _: Tokens((ids,)),
        condition=lambda tokens: Condition(model(tokens.ids[0]).last_hidden_state),
    )
    alone: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=1, global_rank=0), _trainer=None)
    method: Any = SimpleNamespace(
        pipeline=pipeline,
        processes=Processes(alone),
        layers=edited,
        edited_names=list(edited),
        retain_prompts=[],
        retain_empty=False,
        stretches=(),
    )
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    solver = NullSpace(threshold=1.0, rule="soft", ridge=100.0)
    found, retained = RetainedLayers(method), dict[str, Any]()
    for name, layer in edited.items():
        if name not in retained:
            retained = {}  # released before others are gathered
            retained = found.of(name)
            weights = {own: edited[own].weight for own in retained}
            solver.prepare(retained, lambda calls: [call() for call in calls], torch.device("cpu"), weights)
        keys, values = torch.randn(EDITED, inputs), torch.randn(EDITED, WIDTH)
        solver.solve([Write(name, layer.weight.double(), torch.bfloat16, keys, values, retained[name])])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return peak / 1e9, time.perf_counter() - start, len(found.holding.groups), len(found.holding.thin)


def main() -> None:
    """Measure once and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10240, help="inputs of each layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8, help=f"retained prompts, of {LENGTH} tokens each")
    parser.add_argument("--bound", type=float, default=None, help="GB that are held at once; by default 4 GiB")
    given = parser.parse_args()
    peak, seconds, groups, thin = measure(given.inputs, given.layers, given.prompts, given.bound)
    cells = given.layers, f"{given.inputs:,}", given.prompts * LENGTH, groups, thin, f"{peak:.2f}", f"{seconds:.0f}"
    print("| layers | inputs | retained keys | groups | layers that keep keys | peak, GB | seconds |")
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
