"""Measures what the moments and null spaces of wide layers in a UNet's blocks take, with random weights.

    python benchmarks/block_moments.py                          # 4 layers of 5,120 inputs, one after the other
    python benchmarks/block_moments.py --bound 99               # all moments at once, as where they fit
    python benchmarks/block_moments.py --prompts 2              # few retained keys, which are kept instead

A UNet in bfloat16 predicts at pictures of 16 by 16 places, and each `ff.net.2` is edited within the null space of what
it retains, as `UNetFeedForwardRefinement` does. The peak is that of the process beyond the model and its libraries.
"""

from __future__ import annotations

import argparse
import resource
import time
from types import SimpleNamespace
from typing import Any

SIDE = 16
EDITED = 20


def measure(inputs: int, layers: int, prompts: int, bound: float, gather_only: bool) -> tuple[Any, ...]:
    """Peak in GB, seconds of the processor, groups, layers that keep their keys, forwards and keys of a layer."""
    import psutil
    import torch
    from diffusers import UNet2DConditionModel

    from lit_unlearn.core.null_space_solver import NullSpace
    from lit_unlearn.core.solvers import Write
    from lit_unlearn.diffusion.condition import Condition
    from lit_unlearn.diffusion.sampling import count_forwards
    from lit_unlearn.methods.shared import moments
    from lit_unlearn.methods.shared.processes import Processes
    from lit_unlearn.methods.shared.retained_blocks import RetainedBlocks

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    moments.MOST_HELD_BYTES = round(bound * 1e9)
    width = inputs // 4
    torch.set_default_dtype(torch.bfloat16)  # so that no float32 weights count in the peak
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(width,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        transformer_layers_per_block=layers,
        cross_attention_dim=64,
        attention_head_dim=64,
        use_linear_projection=True,
    )
    torch.set_default_dtype(torch.float32)
    unet.eval()
    edited: dict[str, Any] = {
        f"unet.{name}.weight": layer for name, layer in unet.named_modules() if name.endswith("ff.net.2")
    }
    pipeline = SimpleNamespace(
        num_places=lambda name: SIDE**2,
        predict=lambda x_t, timesteps, condition: unet(x_t, timesteps, condition.states).sample,
    )
    alone: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=1, global_rank=0), _trainer=None)
    method: Any = SimpleNamespace(
        pipeline=pipeline, processes=Processes(alone), layers=edited, edited_names=list(edited)
    )
    noisy = torch.randn(prompts, 4, SIDE, SIDE).bfloat16()
    condition = Condition(torch.randn(prompts, 8, 64).bfloat16())
    timesteps = torch.randint(0, 1000, (prompts,))
    before, start = psutil.Process().memory_info().rss, time.process_time()
    solver = NullSpace(threshold=1.0, rule="soft", ridge=100.0)
    blocks, retained = RetainedBlocks(method, noisy, timesteps, [condition], prompts), dict[str, Any]()
    with count_forwards(unet) as counter:
        for name, layer in edited.items():
            if name not in retained:
                retained = {}  # released before others are gathered
                retained = blocks.of(name)
                if gather_only:
                    continue
                weights = {own: edited[own].weight for own in retained}
                solver.prepare(retained, lambda calls: [call() for call in calls], torch.device("cpu"), weights)
            if not gather_only:
                keys, values = torch.randn(EDITED, inputs), torch.randn(EDITED, width)
                solver.solve([Write(name, layer.weight.double(), torch.bfloat16, keys, values, retained[name])])
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e9
    seconds = time.process_time() - start
    return peak, seconds, len(blocks.holding.groups), len(blocks.holding.thin), counter.count, prompts * SIDE**2


def main() -> None:
    """Measure once and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5120, help="inputs of each layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=20, help=f"retained prompts, of {SIDE**2} keys each")
    parser.add_argument("--bound", type=float, default=0, help="GB that are held at once")
    parser.add_argument("--gather_only", action="store_true", help="leave out the null spaces and the edit")
    given = parser.parse_args()
    peak, seconds, groups, thin, forwards, keys = measure(
        given.inputs, given.layers, given.prompts, given.bound, given.gather_only
    )
    cells = given.layers, f"{given.inputs:,}", f"{keys:,}", groups, thin, forwards, f"{peak:.2f}", f"{seconds:.0f}"
    print("| layers | inputs | retained keys | groups | layers that keep keys | forwards | peak, GB | CPU seconds |")
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
