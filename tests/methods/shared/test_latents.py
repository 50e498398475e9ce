"""Latents that are made once: what determines them, and what happens to files that are missing, damaged or foreign."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import sample_latents
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import initial_noise
from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.methods.shared import latents as anchors
from lit_unlearn.methods.shared.latents import LatentCache, PretrainedSampler
from lit_unlearn.system.files import WriteError

PROMPTS, SEEDS = ["a cat", "a cat at sunset", "a parrot"], [7, 8, 9]


class Maker:
    """Makes latents that tell their number, and remembers which it made."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.made: list[int] = []
        self.stop_before = stop_before

    def __call__(self, numbers: list[int]) -> Tensor:
        if self.stop_before in numbers:
            raise InterruptedError
        self.made += numbers
        return torch.stack([torch.full((4, 2, 2), float(number)) for number in numbers])


def cache(folder: Path, **settings: Any) -> LatentCache:
    return LatentCache(folder, {"model": "a", **settings}, count=7, chunk_size=2)


EXPECTED = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 4, 2, 2)


# --- files


def test_a_full_disk_is_named_and_what_was_made_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def full_after_three_files(descriptor: int) -> None:  # settings.json and two chunks
        if len([path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".tmp"]) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    first, second = Maker(), Maker()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_three_files)
        with pytest.raises(
            WriteError, match=r"Could not write \S+/00002.safetensors: No space left on device; free some"
        ):
            cache(tmp_path).get(first)
    folder = tmp_path / cache(tmp_path).key[:16]
    assert sorted(os.listdir(folder)) == ["00000.safetensors", "00001.safetensors", "settings.json"]
    assert torch.equal(cache(tmp_path).get(second).latents, EXPECTED)
    assert second.made == [4, 5, 6]


@pytest.mark.parametrize("before", [2, 6])
def test_a_cache_that_is_deleted_while_it_is_filled(before: int, tmp_path: Path) -> None:
    class Deletes(Maker):
        def __call__(self, numbers: list[int]) -> Tensor:
            if before in numbers:
                shutil.rmtree(tmp_path)
            return super().__call__(numbers)

    made = cache(tmp_path).get(Deletes())
    assert torch.equal(made.latents, EXPECTED)
    again = Maker()
    assert torch.equal(cache(tmp_path).get(again).latents, EXPECTED)
    assert again.made == list(range(before))  # what was deleted


def test_a_file_that_is_deleted_while_it_is_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cache(tmp_path)
    made.get(Maker())
    original = anchors.safe_open

    def deleted_first(file: Path, **options: Any) -> Any:
        file.unlink()
        return original(file, **options)

    monkeypatch.setattr(anchors, "safe_open", deleted_first)
    assert made.read(1) is None


def test_latents_are_made_once(tmp_path: Path) -> None:
    first, second = Maker(), Maker()
    made, read = cache(tmp_path).get(first), cache(tmp_path).get(second)
    assert (first.made, second.made) == (list(range(7)), [])
    assert (made.made, read.made) == (7, 0)
    assert torch.equal(made.latents, EXPECTED)
    assert torch.equal(read.latents, EXPECTED)
    assert made.key == read.key
    assert sorted(file.name for file in (tmp_path / made.key[:16]).iterdir()) == [
        *(f"0000{number}.safetensors" for number in range(4)),
        "settings.json",
    ]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    interrupted, resumed = Maker(stop_before=4), Maker()
    with pytest.raises(InterruptedError):
        cache(tmp_path).get(interrupted)
    assert interrupted.made == [0, 1, 2, 3]
    result = cache(tmp_path).get(resumed)
    assert resumed.made == [4, 5, 6]
    assert result.made == 3
    assert torch.equal(result.latents, EXPECTED)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("there", [[], [0, 1], [2]])
def test_processes_share_out_what_is_missing(world_size: int, there: list[int], tmp_path: Path) -> None:
    cache(tmp_path).get(Maker())
    for number in set(range(4)) - set(there):
        cache(tmp_path).file(number).unlink()
    barrier = threading.Barrier(world_size)
    makers = [Maker() for _ in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        results = list(
            pool.map(lambda rank: cache(tmp_path).get(makers[rank], rank, world_size, barrier.wait), range(world_size))
        )
    assert all(torch.equal(result.latents, EXPECTED) for result in results)
    missing = [number for number in range(7) if number // 2 not in there]
    assert sorted(number for maker in makers for number in maker.made) == missing
    # Each process makes as many files as any other, give or take one.
    assert max(len(maker.made) for maker in makers) <= 2 * -(-(4 - len(there)) // world_size)


def test_machines_without_a_common_folder_make_their_own(tmp_path: Path) -> None:
    makers, barrier = [Maker(), Maker()], threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        results = list(
            pool.map(lambda rank: cache(tmp_path / str(rank)).get(makers[rank], rank, 2, barrier.wait), range(2))
        )
    assert all(torch.equal(result.latents, EXPECTED) for result in results)
    assert all(sorted(maker.made) == list(range(7)) for maker in makers)


def truncate(file: Path, folder: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def change_one_byte(file: Path, folder: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def put_other_settings(file: Path, folder: Path) -> None:
    other = cache(folder / "other", model="b")
    other.get(Maker())
    shutil.copy(other.file(1), file)


def put_another_chunk(file: Path, folder: Path) -> None:
    shutil.copy(file.with_name("00000.safetensors"), file)


def put_a_stranger(file: Path, folder: Path) -> None:
    save_file({"latents": torch.zeros(2, 4, 2, 2)}, file)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "is damaged"),
        (change_one_byte, "its content has another hash"),
        (put_other_settings, "another model or settings"),
        (put_another_chunk, "holds other latents"),
        (put_a_stranger, "holds other latents"),
    ],
)
def test_damaged_and_foreign_files_are_made_anew(
    damage: Callable[[Path, Path], None], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path).get(Maker())
    file = cache(tmp_path).file(1)
    damage(file, tmp_path)
    again, said = Maker(), []  # type: tuple[Maker, list[str]]
    monkeypatch.setattr("lit_unlearn.methods.shared.latents.rank_zero_info", said.append)
    result = cache(tmp_path).get(again)
    assert again.made == [2, 3]
    assert torch.equal(result.latents, EXPECTED)
    (sentence,) = [line for line in said if "it is made again" in line]
    assert f"{file} " in sentence
    assert problem in sentence
    assert torch.equal(load_file(file)["latents"], EXPECTED[2:4])


def test_a_cache_holds_something(tmp_path: Path) -> None:
    for count, chunk_size in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"count={count} and chunk_size={chunk_size} .* at least 1"):
            LatentCache(tmp_path, {}, count, chunk_size)


# --- what the pretrained model draws


@pytest.fixture
def module(tiny_sd: Path, pets: str, trainer_with: Callable[..., L.Trainer]) -> ConceptAblation:
    """A method as it is while a trainer runs it."""
    module = ConceptAblation(concept="dog", model=str(tiny_sd), concept_set=pets)
    module.configure_model()
    module.trainer = trainer_with()
    return module


def test_latents_are_the_pretrained_models_also_after_an_edit(module: ConceptAblation, tmp_path: Path) -> None:
    components = module.pipeline
    expected = sample_latents(
        module.unet,
        components.scheduler,
        encode_prompts(components.tokenizer, module.text_encoder, PROMPTS),
        encode_prompts(components.tokenizer, module.text_encoder, [""]),
        initial_noise(module.unet, SEEDS),
        2,
        3.0,
    )
    with torch.no_grad():
        for parameter in module.pretrained.parameters.values():
            parameter.mul_(-1)
    edited = {name: parameter.detach().clone() for name, parameter in module.pretrained.parameters.items()}
    drawn = PretrainedSampler(module, 2, 3.0, tmp_path).latents(PROMPTS, SEEDS).latents
    assert torch.equal(drawn, expected)
    assert all(torch.equal(edited[name], parameter) for name, parameter in module.pretrained.parameters.items())


def test_an_interruption_costs_no_forward_twice(module: ConceptAblation, tmp_path: Path) -> None:
    sampler = PretrainedSampler(module, 2, 3.0, tmp_path, batch_size=1)
    whole = sampler.latents(PROMPTS, SEEDS)
    once = module.forwards.count
    assert once == len(PROMPTS) * 2 * 2  # two steps with guidance
    sampler.cache(PROMPTS, SEEDS).file(1).unlink()
    again = PretrainedSampler(module, 2, 3.0, tmp_path, batch_size=1).latents(PROMPTS, SEEDS)
    assert module.forwards.count - once == 2 * 2
    assert again.made == 1
    assert torch.equal(again.latents, whole.latents)


def keyed(module: ConceptAblation, folder: Path, **arguments: Any) -> str:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 2, **arguments}
    prompts, seeds = options.pop("prompts", PROMPTS), options.pop("seeds", SEEDS)
    return PretrainedSampler(module, folder=folder, **options).cache(prompts, seeds).key


def test_the_key_has_all_arguments(module: ConceptAblation, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"num_inference_steps": 3},
        {"guidance_scale": 3.5},
        {"batch_size": 3},
        {"prompts": [*PROMPTS[:2], "a dog"]},
        {"prompts": PROMPTS[::-1]},
        {"prompts": PROMPTS[:2], "seeds": SEEDS[:2]},
        {"seeds": [7, 8, 10]},
    ]
    keys = [keyed(module, tmp_path, **arguments) for arguments in variants]
    assert len(set(keys)) == len(variants)
    assert keys == [keyed(module, tmp_path, **arguments) for arguments in variants]


def add_one(module: ConceptAblation, name: str) -> None:
    with torch.no_grad():
        module.pipeline.named_parameters()[name].flatten()[0] += 1


def test_the_key_has_all_of_the_model_that_draws(module: ConceptAblation, tmp_path: Path) -> None:
    components = module.pipeline
    scheduler = components.scheduler
    changes: list[Callable[[], object]] = [
        lambda: add_one(module, "unet.conv_out.bias"),
        lambda: add_one(module, "text_encoder.embeddings.token_embedding.weight"),
        lambda: setattr(components, "scheduler", scheduler.from_config(scheduler.config, solver_order=1)),
        lambda: setattr(components, "scheduler", DDIMScheduler.from_config(components.scheduler.config)),
        lambda: setattr(components.tokenizer, "pad_token", "!"),
        lambda: module.unet.register_to_config(sample_size=16),  # the pictures' size
        lambda: module.bfloat16(),
    ]
    keys = [keyed(module, tmp_path)]
    for change in changes:
        change()
        keys.append(keyed(module, tmp_path))
    assert len(set(keys)) == len(changes) + 1


def test_the_key_has_what_surrounds_the_drawing(
    module: ConceptAblation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [keyed(module, tmp_path)]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(keyed(module, tmp_path))
    monkeypatch.setattr("diffusers.__version__", "0.0.1")
    keys.append(keyed(module, tmp_path))
    assert len(set(keys)) == 3


def test_the_key_has_nothing_else(module: ConceptAblation, tmp_path: Path) -> None:
    before = keyed(module, tmp_path)
    add_one(module, "vae.decoder.conv_out.bias")
    add_one(module, module.edited_names[0])  # the edit itself: pretrained values count
    assert keyed(module, tmp_path) == before
    assert keyed(module, tmp_path / "elsewhere") == before
