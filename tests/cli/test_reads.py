"""A command reads each weight of the base model once; those that the edit changes once more where it is loaded."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors
from torch import Tensor

from helpers import LAYERS
from lit_unlearn import cli
from lit_unlearn.diffusion import parameters

EDITED, OTHERS = "edited weights", "others"


class CountingReader:
    """``safe_open`` that counts how often each tensor of each file is read."""

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

    def get_tensor(self, name: str) -> Tensor:
        self.reads[self.path, name] += 1
        return self.file.get_tensor(name)

    def get_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.file.get_tensors()
        self.reads.update((self.path, name) for name in found)
        return found

    def get_slice(self, name: str) -> Any:
        self.reads[self.path, name] += 1
        return self.file.get_slice(name)


@pytest.fixture
def reads(
    run_folder: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, set[int]], int]]:
    """Runs a command; returns how often it reads the base model's weights, and how often it hashes each at most."""
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES]:
        if vars(module).get("safe_open") is CountingReader.original:
            monkeypatch.setattr(module, "safe_open", CountingReader)
    files = [path for part in PARTS for path in (tiny_sd / part.removesuffix(".")).glob("*.safetensors")]
    names = {path: list(CountingReader(path, framework="pt").keys()) for path in files}
    hashed: Counter[str] = Counter()
    add = parameters.Fingerprint.add

    def counting_add(self: parameters.Fingerprint, name: str, value: Tensor) -> None:
        hashed[name] += 1  # within its part: as the base model's are named, whole; the edited ones have full names
        add(self, name, value)

    monkeypatch.setattr(parameters.Fingerprint, "add", counting_add)

    def run(*args: str) -> tuple[dict[str, set[int]], int]:
        CountingReader.reads.clear()
        hashed.clear()
        assert cli.main(args) == 0
        found: dict[str, set[int]] = {EDITED: set(), OTHERS: set()}
        for path in files:
            for name in names[path]:
                is_edited = f"{path.parent.name}.{name}" in LAYERS
                found[EDITED if is_edited else OTHERS].add(CountingReader.reads[str(path), name])
        return found, max((count for name, count in hashed.items() if not name.startswith(PARTS)), default=0)

    return run


LIBRARIES = ("lit_unlearn", "safetensors", "transformers", "diffusers")
PARTS = ("text_encoder.", "unet.", "vae.")
CHECKPOINT, DELTA = "logs/null_space/dog/version_0/checkpoints/last.ckpt", "edit.safetensors"
ONCE = {EDITED: {1}, OTHERS: {1}}
"""The files are read and nothing is loaded."""
CHECKED = {EDITED: {2}, OTHERS: {1}}
"""The edited weights are compared before anything is loaded, and all are read by loading."""
GENERATE = ["generate", "a dog", "-o", "a.png", "--num_inference_steps", "1"]
ATTACK = ["attack", "--attacks", "concept_inversion", "--steps", "1", "--num_pictures", "1", "--output", "found"]


@pytest.mark.parametrize(
    ("args", "expected", "hashes"),
    [
        (["export", "--ckpt_path", DELTA, "--output", "out"], CHECKED, 1),
        (["export", "--ckpt_path", CHECKPOINT, "--output", "out"], CHECKED, 1),
        (["export", "--ckpt_path", DELTA, "--output", "out", "--delta"], ONCE, 1),
        (["export", "--ckpt_path", CHECKPOINT, "--output", "out", "--delta"], ONCE, 1),
        (["export", "--ckpt_path", CHECKPOINT, "--output", "out", "--lora", "auto"], ONCE, 1),
        ([*GENERATE, "--ckpt_path", DELTA], CHECKED, 1),
        ([*GENERATE, "--ckpt_path", CHECKPOINT], CHECKED, 0),
        ([*ATTACK, "--ckpt_path", DELTA], CHECKED, 1),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, list) else "",
)
def test_every_weight_is_read_and_hashed_once(
    reads: Callable[..., Any],
    judge: str,
    tiny_sd: Path,
    args: list[str],
    expected: dict[str, set[int]],
    hashes: int,
) -> None:
    assert cli.main(["export", "--ckpt_path", CHECKPOINT, "--output", DELTA, "--delta"]) == 0
    judged = ["--judge", judge] if args[0] == "attack" else []
    model = ["--model", str(tiny_sd)] if DELTA in args else []  # a delta does not say where its base lies
    assert reads(*args, *judged, *model) == (expected, hashes)


@pytest.mark.parametrize("kind", ["folder", "delta"])
def test_an_export_is_compared_with_its_base_in_one_pass(reads: Callable[..., Any], tiny_sd: Path, kind: str) -> None:
    delta = ["--delta"] if kind == "delta" else []
    assert cli.main(["export", "--ckpt_path", CHECKPOINT, "--output", "out", *delta]) == 0
    assert reads("verify", "out", "--base", str(tiny_sd)) == (ONCE, 1)
