"""Measures the cost of exports, of a picture and of a check of an export: seconds, reads of each weight, bytes hashed.

    python benchmarks/export_reads.py --width 128

Builds a pipeline with the architecture of Stable Diffusion and random weights in ``--folder`` (about 600 MB in float32
at width 128; 320 is that of Stable Diffusion 1.4), and an edit of its cross-attention, as a checkpoint and as a delta.
Then it runs the commands in this process and prints a table. A read is counted when safetensors returns a tensor, so
loading a pipeline counts as a read of every weight. Only hashes of weights are counted, not those of written files.
To measure another version of the package, put its folder into ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import safetensors

LIBRARIES = ("lit_unlearn", "safetensors", "transformers", "diffusers")


def build(folder: Path, width: int) -> None:
    """Write the pipeline and the checkpoint of an edit, unless they exist."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lit_unlearn.diffusion.load import load_pipeline
    from lit_unlearn.diffusion.parameters import fingerprint, match_parameters
    from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

    if (folder / "edit.ckpt").exists():
        return
    tokenizer = load_pipeline("emoji-sd").tokenizer
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hidden = 64 * (width // 32)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=12,
        num_attention_heads=8, max_position_embeddings=tokenizer.model_max_length, projection_dim=hidden, **special,
    )  # fmt: skip
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=hidden, attention_head_dim=8,
        ),
        vae=AutoencoderKL(
            block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=64,
        ),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    parameters = load_pipeline(str(folder / "model")).named_parameters()
    names = match_parameters("xattn", parameters)
    values = {name: parameters[name].detach().clone() for name in names}
    content = {
        "state_dict": {name: value + 0.01 for name, value in values.items()},
        "hyper_parameters": {"dtype": "float32", "concept_set": "emoji20"},
        CHECKPOINT_KEY: {
            "method": "ESD",
            "concepts": ["dog"],
            "model": str(folder / "model"),
            "edited_names": names,
            "base_fingerprint": fingerprint(values),
        },
    }
    torch.save(content, folder / "edit.ckpt")


class CountingReader:
    """``safe_open`` that counts the tensors that it returns, by file and name."""

    reads: ClassVar[Counter[tuple[str, str]]] = Counter()
    original = safetensors.safe_open

    def __init__(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self.path, self.file = str(path), self.original(path, *args, **kwargs)

    def __enter__(self) -> CountingReader:
        self.file.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.__exit__(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> Any:
        """A tensor of the file."""
        self.reads[self.path, name] += 1
        return self.file.get_tensor(name)

    def get_tensors(self) -> dict[str, Any]:
        """All tensors of the file."""
        found: dict[str, Any] = self.file.get_tensors()
        self.reads.update((self.path, name) for name in found)
        return found

    def get_slice(self, name: str) -> Any:
        """A tensor of the file, read when it is indexed."""
        self.reads[self.path, name] += 1
        return self.file.get_slice(name)


class CountingHash:
    """SHA-256 that counts its input bytes."""

    size = 0

    def __init__(self) -> None:
        import hashlib

        self.digest = hashlib.sha256()

    def update(self, data: Any) -> None:
        """Add bytes."""
        CountingHash.size += memoryview(data).nbytes
        self.digest.update(data)

    def hexdigest(self) -> str:
        """The hash of all bytes added so far."""
        return self.digest.hexdigest()


def count() -> None:
    """Start counting."""
    import transformers.modeling_utils  # noqa: F401 - to be counted, they must be there

    from lit_unlearn.diffusion import new_tokens, parameters, stored  # noqa: F401 - as before
    from lit_unlearn.edits import checkpoint, export, verify  # noqa: F401 - as before

    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES]:
        if vars(module).get("safe_open") is CountingReader.original:
            module.safe_open = CountingReader  # type: ignore[attr-defined]
    parameters.hashlib = SimpleNamespace(sha256=CountingHash)  # type: ignore[assignment]


def main() -> None:
    """Build what is missing, run the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="logs/bench/export_reads", help="folder of the pipeline and the exports")
    parser.add_argument("--width", type=int, default=128, help="channels of the UNet's first block; default: 128")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each command; the fastest one counts")
    arguments = parser.parse_args()

    import lit_unlearn
    from lit_unlearn import cli

    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    build(folder, arguments.width)
    model, out, delta = folder / "model", folder / "out", folder / "edit.safetensors"
    delta.unlink(missing_ok=True)
    assert cli.main(["export", "--ckpt_path", str(folder / "edit.ckpt"), "--output", str(delta), "--delta"]) == 0
    export = ["export", "--output", str(out), "--overwrite", "--ckpt_path"]
    again = ["export", "--output", str(folder / "again.safetensors"), "--overwrite", "--ckpt_path"]
    generate = ["generate", "a dog", "-o", str(folder / "a.png"), "--num_inference_steps", "1", "--overwrite"]
    commands = {
        "export a folder from a delta": [*export, str(delta), "--model", str(model)],
        "export a folder from a checkpoint": [*export, str(folder / "edit.ckpt")],
        "verify the folder with --base": ["verify", str(out), "--base", str(model)],
        "export a delta from a checkpoint": [*again, str(folder / "edit.ckpt"), "--delta"],
        "generate a picture with a delta": [
            *generate,
            "--device",
            "cpu",
            "--ckpt_path",
            str(delta),
            "--model",
            str(model),
        ],
    }
    size = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    count()
    print(f"{Path(lit_unlearn.__file__).parent}: a base model of {size / 1e6:.0f} MB\n")
    print("| command | seconds | reads of a weight, mean | at most | hashed, of the model's size |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for what, command in commands.items():
        seconds = []
        for _ in range(arguments.repeat):
            CountingReader.reads.clear()
            CountingHash.size = 0
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                started = time.perf_counter()
                assert cli.main(command) == 0
                seconds.append(time.perf_counter() - started)
        reads = [n for (path, _), n in CountingReader.reads.items() if Path(path).is_relative_to(model)]
        row = f"{min(seconds):.1f} | {sum(reads) / len(reads):.2f} | {max(reads)} | {CountingHash.size / size:.2f}"
        print(f"| {what} | {row} |", flush=True)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
