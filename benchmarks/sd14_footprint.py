"""Measures memory and time of edits at the size of Stable Diffusion 1.4, on this machine.

    python benchmarks/sd14_footprint.py --dtype bfloat16 --output docs/results/sd14_footprint.md

Builds a pipeline of exactly that architecture (512 × 512 pixels) with random weights, in ``--folder``, then runs a
user's commands, each in its own process, with few steps: the memory and the time of a step do not depend on the values
of the weights or the number of steps. Prints parameters, then seconds, peak resident memory and UNet forwards of each
phase; a phase that was measured in the folder before is not run again. The tokenizer is the embedded model's, with a
length of 77.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml

LENGTH, VOCABULARY = 77, 49408
EDITED, OTHER = "apple", "lemon"
STEPS = 2
PICTURES = 4

COMMON = [
    *("--config", "sd14.yaml", "--concept", EDITED, "--model.init_args.revision", "null"),
    *("--model.init_args.judge", "emoji", "--model.init_args.num_inference_steps", str(STEPS)),
    *("--data.init_args.eval_batch_size", "1", "--data.init_args.images_per_prompt", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


@dataclass(frozen=True)
class Phase:
    """A command whose footprint is measured."""

    name: str
    command: str
    recipe: str
    options: tuple[str, ...]


def build(folder: Path, dtype: str) -> dict[str, int]:
    """Write the pipeline unless it exists; return the number of parameters of each part."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from lit_unlearn.diffusion.load import load_pipeline

    if not (folder / "model_index.json").exists():
        tokenizer = load_pipeline("emoji-sd").tokenizer
        tokenizer.model_max_length = LENGTH
        torch.manual_seed(0)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=LENGTH, projection_dim=768, hidden_act="quick_gelu",
            **special,
        )  # fmt: skip
        blocks = (320, 640, 1280, 1280)
        pipeline = StableDiffusionPipeline(
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=64, block_out_channels=blocks, cross_attention_dim=768, attention_head_dim=8
            ),
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
            ),
            scheduler=DPMSolverMultistepScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.to(getattr(torch, dtype)).save_pretrained(folder)
    components = load_pipeline(str(folder), getattr(torch, dtype))
    return {name: sum(p.numel() for p in module.parameters()) for name, module in components.parts.items()}


def concept_set(path: Path) -> Path:
    """Write two concepts of emoji20 with a direct and an indirect prompt each, for a test of four pictures."""
    from lit_unlearn.data.concepts import load_concept_set

    content = yaml.safe_load(Path(load_concept_set("emoji20").path).read_text(encoding="utf-8"))
    chosen = {name: content["concepts"][name] for name in (EDITED, OTHER)}
    for name, concept in chosen.items():
        concept["adjacent"] = [OTHER if name == EDITED else EDITED]
        concept["target"] = concept["adjacent"][0]
        concept["direct"], concept["indirect"] = concept["direct"][:1], concept["indirect"][:1]
        concept["edit_prompts"], concept["target_prompts"] = concept["edit_prompts"][:4], concept["target_prompts"][:4]
        del concept["adversarial"]
    content |= {"name": "two", "prompts_per_concept": {"direct": 1, "indirect": 1, "edit": 4}, "concepts": chosen}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def phases() -> list[Phase]:
    """Three edits, and a test of one of them, since the cost of a test does not depend on the method."""
    null_space = (
        *("--model.init_args.first_layer", "1", "--model.init_args.last_layer", "2", "--model.init_args.rounds", "1"),
        *("--data.init_args.steps", "2", "--data.init_args.batch_size", "1"),
        *("--trainer.callbacks", "[EvaluationReport]"),
    )
    esd = (
        *("--trainer.max_epochs", "1", "--data.init_args.steps", "4", "--data.init_args.batch_size", "1"),
        *("--model.init_args.num_chain_steps", "2", "--model.init_args.chains", "1"),
        *("--trainer.callbacks", "[EvaluationReport]"),
    )
    uce = ("--trainer.callbacks", "[EvaluationReport]")
    return [
        Phase("null_space: one round, two layers, two steps each", "fit", "null_space_refined.yaml", null_space),
        Phase("test of null_space: four pictures before, four after", "test", "null_space_refined.yaml", null_space),
        Phase("esd: four steps, one chain of two", "fit", "esd.yaml", esd),
        Phase("uce: all keys and values", "fit", "uce.yaml", uce),
    ]


def measure(arguments: list[str], log: Path) -> tuple[float, float]:
    """Run the command; return seconds and peak resident memory in GB.

    Raises:
        RuntimeError: The command failed; the log says why.
    """
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, "-m", "lit_unlearn", *arguments], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments[:3])} failed: see {log}.")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Build the pipeline, run the phases, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="logs/bench/sd14_footprint")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--output", default=None, help="Markdown file to write")
    arguments = parser.parse_args()

    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"sd14_{arguments.dtype}"
    parameters = build(model, arguments.dtype)
    common = [*COMMON, "--model.init_args.model", str(model), "--model.init_args.dtype", arguments.dtype]
    common += ["--model.init_args.concept_set", str(concept_set(folder / "two.yaml"))]
    common += ["--trainer.default_root_dir", str(folder / "logs")]
    threads = os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))
    lines = [
        f"Made on {date.today()} by `python benchmarks/sd14_footprint.py --dtype {arguments.dtype}`, "
        f"{threads} thread(s), {platform.machine()}, no GPU.",
        "Random weights of the architecture of Stable Diffusion 1.4, 512 × 512 pixels.",
        "",
        "Parameters, millions: " + ", ".join(f"{name} {count / 1e6:.1f}" for name, count in parameters.items()) + ".",
        "",
        "| phase | seconds | peak resident memory, GB | UNet forwards |",
        "| --- | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    done_path = folder / f"phases_{arguments.dtype}.json"
    done = json.loads(done_path.read_text(encoding="utf-8")) if done_path.exists() else {}
    for phase in phases():
        if phase.name not in done:
            method = phase.recipe.removesuffix(".yaml")
            options = [*common, *phase.options, "--overwrite" if phase.command == "test" else "--fresh"]
            seconds, memory = measure(
                [phase.command, "--config", phase.recipe, *options], folder / f"{method}_{phase.command}.log"
            )
            run = max((folder / "logs" / method / EDITED).iterdir(), key=lambda path: path.stat().st_mtime)
            forwards = read_forwards(run) if phase.command == "fit" else PICTURES * 2 * 2 * STEPS
            done[phase.name] = {"seconds": seconds, "memory_gb": memory, "unet_forwards": forwards}
            done_path.write_text(json.dumps(done, indent=2), encoding="utf-8")
        found = done[phase.name]
        cells = [phase.name, f"{found['seconds']:.0f}", f"{found['memory_gb']:.1f}", str(found["unet_forwards"])]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_forwards(run: Path) -> int:
    """UNet forwards of the fit in the run's folder."""
    from lit_unlearn.edits.checkpoint import load_checkpoint
    from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

    return int(load_checkpoint(run / "checkpoints" / "last.ckpt")[CHECKPOINT_KEY]["cost"]["unet_forwards"])


if __name__ == "__main__":
    main()
