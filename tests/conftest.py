"""Fixtures of all tests: pipelines of random weights, a concept set, pictures, methods and trainers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import build_flux, build_pixart, build_sd3, build_sdxl
from tiny_sd import build_sd
from torch import Tensor

from helpers import load_copy, original
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.single_file import names
from lit_unlearn.diffusion.single_file.names import Namer
from lit_unlearn.emoji.text_encoder import MAX_LENGTH
from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.value_refinement import ValueRefinement

NOT_OURS = (
    # NumPy's of what diffusers' schedulers do with tensors
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning",
    # Lightning's, where we mean it: the pipeline stays in evaluation mode while it is edited
    "ignore:Found .* module.s. in eval mode at the start of training",
)
"""Warnings of the libraries that do not fail a test."""


def pytest_configure(config: pytest.Config) -> None:
    # The tests' tensors are too small to share, and threads wait for busy neighbours: other processes of tests, one for
    # each core. The variable is for those and for the commands that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # Nor do they need a GPU, and with one their numbers would be others. PyTorch has no such variable for Apple's.
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    torch.backends.mps.is_available = lambda: False  # type: ignore[method-assign]
    # The Makefile sets it for the processes of tests; the commands that tests start would warn of their libraries.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        os.environ.pop("PYTHONWARNDEFAULTENCODING", None)
    for line in NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of Stable Diffusion 1.x; not to be written to."""
    return build_sd(tmp_path_factory.mktemp("models") / "tiny-sd", 0, "quick_gelu", "epsilon")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of Stable Diffusion 2.x: velocity prediction, prompts padded with "!" instead of EOS."""
    return build_sd(tmp_path_factory.mktemp("models") / "tiny-sd2", 1, "gelu", "v_prediction", pad_token="!")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of Stable Diffusion XL; not to be written to."""
    return build_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of Stable Diffusion 3; not to be written to."""
    return build_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_sd3_without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_sd3``, without a T5 and with timesteps that depend on the size; not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3-without-t5"
    return build_sd3(folder, with_t5=False, use_dynamic_shifting=True)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of FLUX.1 dev; its pictures are large, and it is not to be written to."""
    return build_flux(tmp_path_factory.mktemp("models") / "tiny-flux", guidance_embeds=True)


@pytest.fixture(scope="session")
def tiny_pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of PixArt-Alpha for 512 pixels or fewer; not to be written to."""
    return build_pixart(tmp_path_factory.mktemp("models") / "tiny-pixart", alpha=True)


@pytest.fixture(scope="session")
def tiny_pixart_sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the form of PixArt-Sigma; not to be written to."""
    return build_pixart(tmp_path_factory.mktemp("models") / "tiny-pixart-sigma", alpha=False)


@pytest.fixture(scope="session")
def tiny_sd_2022(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_sd`` with its text encoder's weights named as in 2022: a prefix, and position ids among the weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd-2022"
    shutil.copytree(tiny_sd, folder)
    file = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{name}": weight for name, weight in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(MAX_LENGTH).unsqueeze(0)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def single_file() -> Callable[..., Path]:
    """Writes the pipeline in a folder like ``tiny_sd`` as a single file; returns the file."""

    def build(
        folder: Path,
        path: Path,
        dtype: torch.dtype = torch.float32,
        prefix: str = "model.diffusion_model.",
        encoder: tuple[str, Namer] | None = ("cond_stage_model.transformer.", names.clip),
        metadata: dict[str, str] | None = None,
        **more: Tensor,
    ) -> Path:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        made = original(
            pipeline.unet.state_dict(), prefix, names.unet, frozenset(["input_blocks.2.0.op.weight"])
        ) | original(
            pipeline.vae.state_dict(), "first_stage_model.", names.autoencoder, frozenset(["decoder.up.1.block"])
        )
        if encoder is not None:
            made |= original(pipeline.text_encoder.state_dict(), *encoder)
        made = {key: value.to(dtype).contiguous() for key, value in made.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**made, **more}, path, metadata={"format": "pt"} if metadata is None else metadata)
        return path

    return build


@pytest.fixture
def loads_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods take copies of pipelines: loading took a third of their tests' time, and has its own in ``diffusion``."""

    def load(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> StableDiffusion:
        return load_copy(folder, dtype, None, device)

    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", load)


@pytest.fixture
def components(tiny_sd: Path) -> StableDiffusion:
    """The parts of ``tiny_sd``, each test's own."""
    return load_copy(str(tiny_sd))


@pytest.fixture
def broken_model(tiny_sd: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies ``tiny_sd`` and applies what is passed, a function of the copy's folder, to it."""

    def build(damage: Callable[[Path], Any]) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(tiny_sd, folder)
        damage(folder)
        return folder

    return build


PETS: dict[str, Any] = {
    "dog": {
        "kind": "object",
        "target": "soccer ball",  # two tokens for one
        "anchor": "a toy",
        "question": "Is there a dog in this picture?",
        "direct": ["one dog"],
        "indirect": ["the pet that barks"],
        "edit_prompts": ["a dog", "the dog at sunset"],
        "target_prompts": ["a soccer ball", "the soccer ball at sunset"],
    },
    "cat": {
        "kind": "object",
        "target": "parrot",
        "anchor": "a bird",
        "question": "Is there a cat in this picture?",
        "direct": ["one cat"],
        "indirect": ["the pet that purrs"],
        "edit_prompts": ["a cat", "the cat in the rain"],
        "target_prompts": ["a parrot", "the parrot in the rain"],
    },
}


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A concept set of two concepts with two prompt pairs each.

    To edit one retains two prompts of 32 tokens, so at least half of the 128 inputs of ``fc2`` are free: the null space
    of ``tiny_sd`` is exact.
    """
    path = tmp_path_factory.mktemp("concepts") / "pets.yaml"
    counts = {"direct": 1, "indirect": 1, "edit": 2}
    path.write_text(
        yaml.safe_dump({"name": "pets", "prompts_per_concept": counts, "concepts": PETS}, sort_keys=False),
        encoding="utf-8",
    )
    return str(path)


FOLDERS = {"keep": ["a dog", "a dog", "a cat", "a cat", "an owl"], "forget": ["a dog", "a cat"]}


@pytest.fixture(scope="session")
def keep_forget(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders ``keep`` and ``forget``, 48 by 48 pixels of smooth noise; not to be written to."""
    rng = np.random.default_rng(0)
    folders = {}
    for name, captions in FOLDERS.items():
        folder = tmp_path_factory.mktemp(name)
        lines = []
        for number, caption in enumerate(captions):
            blocks = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((48, 48), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
        folders[name] = str(folder)
    return folders


@pytest.fixture
def refinement(tiny_sd: Path, pets: str) -> Callable[..., ValueRefinement]:
    """Makes a ``ValueRefinement`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(kind: type[ValueRefinement] = ValueRefinement, **arguments: Any) -> ValueRefinement:
        defaults = {
            "concept": "dog",
            "model": str(tiny_sd),
            "concept_set": pets,
            "num_inference_steps": 1,
            "optimizer": partial(torch.optim.Adam, lr=0.2),
        }
        return kind(**{**defaults, **arguments})

    return build


@pytest.fixture
def ablation(tiny_sd: Path, pets: str, tmp_path: Path) -> Callable[..., ConceptAblation]:
    """Makes a ``ConceptAblation`` that ablates the dog in ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> ConceptAblation:
        defaults = {
            "concept": "dog",
            "model": str(tiny_sd),
            "concept_set": pets,
            "images": 4,
            "num_inference_steps": 1,
            "anchor_folder": str(tmp_path / "anchors"),
            "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        }
        return ConceptAblation(**{**defaults, **arguments})

    return build


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Fits a method for one epoch of two steps, with the callbacks that follow it, and returns the trainer."""

    def run(
        module: ConceptEditor,
        *callbacks: L.Callback,
        ckpt_path: Path | None = None,
        max_epochs: int = 1,
        precision: Any = None,
        **data: Any,
    ) -> L.Trainer:
        prompts = ConceptPrompts(module.hparams["concept"], module.hparams["concept_set"], **{"steps": 2, **data})
        trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=max_epochs, precision=precision, limit_val_batches=0)
        trainer.fit(module, prompts, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
        return trainer

    return run


def quiet_trainer(folder: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    """A trainer on one CPU that shows and saves nothing."""
    defaults = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        defaults["enable_checkpointing"] = False
    return L.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder, **{**defaults, **arguments}
    )


@pytest.fixture
def trainer_with(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Makes a trainer on one CPU with the given callbacks that shows and saves nothing."""
    return partial(quiet_trainer, tmp_path)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium without a window, as selenium's driver."""
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs chromium and chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    options.add_argument("--window-size=1500,1000")
    driver = selenium.Chrome(service=selenium.ChromeService(driver_path), options=options)
    yield driver
    driver.quit()
