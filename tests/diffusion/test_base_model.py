"""A base model is found once, and what is known of its weights is not read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from helpers import LAYERS
from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.load import check_model
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.stored import StoredWeights, WholeModel


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that are read from files from now on, within their parts."""
    names: list[str] = []
    original = StoredWeights.__getitem__

    def getitem(self: StoredWeights, name: str) -> torch.Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(StoredWeights, "__getitem__", getitem)
    return names


def test_a_folder_is_found_without_reading_its_weights(tiny_sd: Path, read: list[str]) -> None:
    base = BaseModel.find(str(tiny_sd))
    assert (base.name, base.place, base.revision, base.commit) == (str(tiny_sd), tiny_sd, None, None)
    assert base.names == [f"{part}.{name}" for part, names in check_model(str(tiny_sd)).items() for name in names]
    assert set(LAYERS) < set(base.names)
    assert not read


def test_a_hub_id_is_found_by_its_shape() -> None:
    base = BaseModel.find("owner/name", "main")
    assert (base.name, base.place, base.revision, base.names) == ("owner/name", "owner/name", "main", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_hashes_from_the_files_and_from_the_pipeline(
    tiny_sd: Path, tiny_sd_2022: Path, dtype: torch.dtype
) -> None:
    bases = [BaseModel.find(str(folder)) for folder in (tiny_sd, tiny_sd_2022, tiny_sd)]
    loaded = bases[2].load(dtype)
    expected = WholeModel.loaded(loaded).sha256()
    assert [bases[0].sha256(dtype), bases[1].sha256(dtype), bases[2].sha256(dtype, loaded)] == [expected] * 3
    prints = [base.fingerprint(LAYERS, dtype) for base in bases[:2]]
    values = {name: loaded.named_parameters()[name] for name in LAYERS}
    assert [*prints, bases[2].fingerprint(LAYERS, dtype, values)] == [fingerprint(values)] * 3


def test_no_weight_is_read_twice(tiny_sd: Path, read: list[str]) -> None:
    base = BaseModel.find(str(tiny_sd))
    assert base.fingerprint(LAYERS, torch.float32) == base.fingerprint(reversed(LAYERS), torch.float32)
    hashes = base.sha256(torch.float32)
    assert base.sha256(torch.float32) is hashes
    assert base.weights(LAYERS, torch.float32) is not None
    assert len(read) == len(base.weight_names())
    other = base.sha256(torch.bfloat16)  # of other bytes
    assert other.keys() == hashes.keys() and not set(other.values()) & set(hashes.values())


def test_a_pipeline_at_hand_is_hashed_in_place_of_the_files(tiny_sd: Path, read: list[str]) -> None:
    base = BaseModel.find(str(tiny_sd))
    loaded = base.load()
    before = base.sha256(torch.float32, loaded)
    with torch.no_grad():
        loaded.named_parameters()[LAYERS[0]].add_(1)
    assert base.sha256(torch.float32, loaded) is before  # what the model was before it was edited
    assert not read


def test_values_are_kept_until_the_pipeline_is_loaded(tiny_sd: Path, components: StableDiffusion) -> None:
    base = BaseModel.find(str(tiny_sd))
    first, again = (base.weights(LAYERS, torch.float32) for _ in range(2))
    assert first is not None and again is not None
    for name in LAYERS:
        assert first[name] is again[name]
        assert torch.equal(first[name], components.named_parameters()[name])
    base.load()
    after = base.weights(LAYERS, torch.float32)
    assert after is not None and after[LAYERS[0]] is not first[LAYERS[0]]


def test_weights_that_it_lacks(tiny_sd: Path) -> None:
    base = BaseModel.find(str(tiny_sd))
    assert base.weights(["unet.extra"], torch.float32) is None
    assert base.fingerprint(["unet.extra"], torch.float32) is None


@pytest.mark.parametrize(
    ("num_inference_steps", "config"),
    [
        # to the epsilon of a picture without any signal, which clip_sample of 2022 would hide
        (4, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": True}),
        # the last timestep is there with steps_offset=0 of 2022, and not with 1
        (1000, {"clip_sample": False, "steps_offset": 0}),
    ],
)
def test_steps_are_checked_with_the_configuration_that_is_drawn_with(
    num_inference_steps: int, config: dict[str, Any], broken_model: Callable[..., Path]
) -> None:
    def damage(folder: Path) -> None:
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)
        scheduler.save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    base = BaseModel.find(str(broken_model(damage)))
    with pytest.raises(ValueError, match=f"steps={num_inference_steps} "):
        base.check_steps(num_inference_steps, "steps")


def test_a_model_of_the_hub_is_fetched_once_for_its_weights(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def fetch(*options: object) -> Path:
        calls.append(options)
        return tiny_sd

    monkeypatch.setattr(base_model, "fetch", fetch)
    base = BaseModel.find("owner/name", "v1")
    assert base.sha256(torch.float32) == BaseModel.find(str(tiny_sd)).sha256(torch.float32)
    assert base.weights(LAYERS, torch.float32) is not None
    assert set(LAYERS) < set(base.weight_names())
    assert base.names and base.load()
    assert calls == [("owner/name", "v1")]
