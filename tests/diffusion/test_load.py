from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import lit_unlearn
from helpers import sample_latents
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.load import check_model, load_pipeline
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import decode_latents, initial_noise
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.diffusion.stored import WholeModel

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a dog at sunset", "an owl"], [11, 5], 3, 4.0


@pytest.fixture
def components(tiny_sd: Path) -> StableDiffusion:
    """Loaded, where other tests take a copy."""
    return load_pipeline(str(tiny_sd))


def pictures(components: StableDiffusion) -> torch.Tensor:
    tokenizer, text_encoder, unet = components.tokenizer, components.text_encoder, components.unet
    latents = sample_latents(
        unet,
        components.scheduler,
        encode_prompts(tokenizer, text_encoder, PROMPTS),
        encode_prompts(tokenizer, text_encoder, [""]),
        initial_noise(unet, SEEDS),
        STEPS,
        GUIDANCE,
    )
    return decode_latents(components.vae, latents)


# --- where a model comes from


def test_a_folder_comes_before_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")
    (tmp_path / "emoji-sd").mkdir()
    (tmp_path / "checkpoints/emoji-sd").mkdir(parents=True)
    assert resolve_model("emoji-sd") == Path("emoji-sd")


@pytest.mark.parametrize("name", ["emoji-sd", "checkpoints/emoji-sd"])
def test_the_embedded_model_is_sought_here_then_in_the_package_then_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(lit_unlearn, "__path__", [str(tmp_path / "tree/lit_unlearn")])
    monkeypatch.setattr("lit_unlearn.diffusion.source.files", lambda package: tmp_path / "tree" / package)
    with pytest.raises(ValueError, match="is no folder and no hub id"):
        resolve_model(name)
    places = (
        tmp_path / "tree/checkpoints/emoji-sd",
        tmp_path / "tree/lit_unlearn/checkpoints/emoji-sd",
        Path("checkpoints/emoji-sd"),
    )
    for place in places:
        place.mkdir(parents=True)
        assert resolve_model(name) == place


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert resolve_model("CompVis/stable-diffusion-v1-4") == "CompVis/stable-diffusion-v1-4"
    assert check_model("CompVis/stable-diffusion-v1-4") == {}


def test_the_embedded_model_as_a_run_on_windows_names_it() -> None:
    assert resolve_model("checkpoints\\emoji-sd") == resolve_model("checkpoints/emoji-sd")


@pytest.mark.parametrize(
    "model",
    ["nowhere", "./a/b", "../a", "/no/folder", "~/model", "a/b/c", "checkpoints/mine", "C:/mine", "C:\\a/b", "a\\b"],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"give a diffusers folder, a \.safetensors file, 'emoji-sd'"):
        resolve_model(model)


# --- checks before anything is loaded


@pytest.mark.parametrize("part", ["model_index.json", *StableDiffusion.declared])
def test_a_missing_part_is_named(part: str, broken_model: Callable[..., Path]) -> None:
    def remove(folder: Path) -> None:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(ValueError, match=f"lacks {part}"):
        check_model(str(broken_model(remove)))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "a pointer"])
def test_a_corrupt_weight_file_is_named(part: str, damage: str, broken_model: Callable[..., Path]) -> None:
    def corrupt(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        content = file.read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
        file.write_bytes({"cut short": content[: len(content) // 2], "empty": b"", "a pointer": pointer}[damage])

    with pytest.raises(ValueError, match=rf"{part}/\w+\.safetensors is corrupt .*copy it again") as caught:
        check_model(str(broken_model(corrupt)))
    assert ("git lfs pull" in str(caught.value)) == (damage == "a pointer")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_part_without_safetensors_is_named(part: str, broken_model: Callable[..., Path]) -> None:
    def rename(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        file.rename(file.with_suffix(".bin"))

    with pytest.raises(ValueError, match=rf"no \*\.safetensors in {part}/"):
        check_model(str(broken_model(rename)))


def test_another_architecture_is_refused_before_weights_load(
    broken_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="only pipelines with a single CLIPTextModel"):
        load_pipeline(str(broken_model(pretend)))


def test_the_check_finds_the_names_that_the_loaded_model_has(
    tiny_sd: Path, tiny_sd_2022: Path, components: StableDiffusion
) -> None:
    for model in (tiny_sd, tiny_sd_2022):
        found = check_model(str(model))
        names = {f"{part}.{name}" for part in found for name in found[part]}
        assert names - {"text_encoder.embeddings.position_ids"} == set(components.named_parameters())


# --- loading and saving


def test_everything_is_frozen_and_in_evaluation_mode(components: StableDiffusion) -> None:
    assert list(components.parts) == ["text_encoder", "unet", "vae"]
    assert not any(parameter.requires_grad for parameter in components.named_parameters().values())
    assert not any(module.training for part in components.parts.values() for module in part.modules())
    assert isinstance(components.scheduler, DPMSolverMultistepScheduler)


def test_names_lead_to_the_parameters(components: StableDiffusion) -> None:
    parameters = components.named_parameters()
    layer = components.text_encoder.encoder.layers[1].mlp.fc2
    assert parameters["text_encoder.encoder.layers.1.mlp.fc2.weight"] is layer.weight
    assert len(parameters) == sum(len(list(part.parameters())) for part in components.parts.values())


def test_weights_take_the_type_asked_for(tiny_sd: Path) -> None:
    parameters = load_pipeline(str(tiny_sd), torch.bfloat16).named_parameters()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}


def test_the_names_of_2022_load_with_equal_weights(tiny_sd_2022: Path, components: StableDiffusion) -> None:
    stored = load_file(tiny_sd_2022 / "text_encoder/model.safetensors")
    assert "text_model.encoder.layers.1.mlp.fc2.weight" in stored
    old = load_pipeline(str(tiny_sd_2022))
    for name, parameter in components.text_encoder.named_parameters():
        assert torch.equal(old.text_encoder.get_parameter(name), parameter), name
        assert torch.equal(stored[f"text_model.{name}"], parameter), name
    assert torch.equal(pictures(old), pictures(components))


def half_precision(folder: Path, beside: bool, variant: str) -> Path:
    """Adds a copy of all weights in half precision to ``folder``, or leaves nothing else."""
    for file in folder.glob("*/*.safetensors"):
        halves = {name: value.half() for name, value in load_file(file).items()}
        save_file(halves, file.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        if not beside:
            file.unlink()
    return folder


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_variant_is_taken_where_there_are_no_other_files(
    beside: bool, variant: str, broken_model: Callable[..., Path], components: StableDiffusion
) -> None:
    folder = broken_model(lambda copy: half_precision(copy, beside, variant))
    names = check_model(str(folder))
    assert sum(len(found) for found in names.values()) == len(components.named_parameters())
    loaded = load_pipeline(str(folder)).named_parameters()
    for name, value in components.named_parameters().items():
        expected = value if beside else value.half().float()
        assert torch.equal(loaded[name], expected), name
    stored = WholeModel.in_folder(folder)
    assert {stored[name].dtype for name in stored.names()} == {torch.float32 if beside else torch.float16}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_load(
    variant: str | None, components: StableDiffusion, tiny_sd: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sd, tmp_path / "sharded")
    for part, module in components.parts.items():
        next((tmp_path / "sharded" / part).glob("*.safetensors")).unlink()
        module.save_pretrained(tmp_path / "sharded" / part, max_shard_size="60KB", variant=variant)  # type: ignore[operator]
    assert len(list(tmp_path.glob("sharded/unet/*-of-*.safetensors"))) > 1
    names = check_model(str(tmp_path / "sharded"))
    assert {part: set(found) for part, found in names.items()} == {
        part: set(module.state_dict()) for part, module in components.parts.items()
    }
    again = load_pipeline(str(tmp_path / "sharded"))
    for name, parameter in components.named_parameters().items():
        assert torch.equal(again.named_parameters()[name], parameter), name


OUTDATED: dict[str, tuple[type[Any], dict[str, Any], dict[str, Any]]] = {
    "clipped": (DDIMScheduler, {"clip_sample": True, "steps_offset": 1}, {}),
    "DDIM without an offset": (DDIMScheduler, {"clip_sample": False, "steps_offset": 0}, {}),
    "PNDM without an offset": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 0}, {}),
    "a size of 2022": (
        DDIMScheduler,
        {"clip_sample": False, "steps_offset": 1},
        {"sample_size": 32, "_diffusers_version": "0.2.2"},
    ),
}


@pytest.mark.filterwarnings("ignore:The configuration file of th:FutureWarning")
@pytest.mark.parametrize(("kind", "config", "unet"), OUTDATED.values(), ids=OUTDATED)
def test_outdated_configurations_draw_what_diffusers_draws_and_so_do_exports(
    kind: type[Any], config: dict[str, Any], unet: dict[str, Any], broken_model: Callable[..., Path], tmp_path: Path
) -> None:
    def outdate(folder: Path) -> None:
        kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config).save_pretrained(
            folder / "scheduler"
        )
        for file, changes in (
            ("model_index.json", {"scheduler": ["diffusers", kind.__name__]}),
            ("unet/config.json", unet),
        ):
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            (folder / file).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    def drawn_by_diffusers(folder: Path) -> torch.Tensor:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        found: torch.Tensor = pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="pt",
        ).images
        return found

    folder = broken_model(outdate)
    with pytest.warns(UserWarning, match=r"of 2022 is taken as .*, as diffusers does on loading"):
        ours = load_pipeline(str(folder))
    drawn = ours.draw(PROMPTS, SEEDS, STEPS, GUIDANCE)
    if unet:
        assert ours.picture_size == (128, 128)
    # Rounding, as above; without the mending 0.75 and 0.004 of 1.
    assert_close(drawn, drawn_by_diffusers(folder), rtol=0, atol=2e-4)
    ours.save(tmp_path / "export")
    assert_close(drawn, drawn_by_diffusers(tmp_path / "export"), rtol=0, atol=2e-4)


def test_pictures_that_are_not_square(broken_model: Callable[..., Path]) -> None:
    def widen(folder: Path) -> None:
        path = folder / "unet/config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, "sample_size": [8, 12]}), encoding="utf-8")

    folder = broken_model(widen)
    ours = load_pipeline(str(folder))
    assert (ours.latent_shape, ours.picture_size) == ((4, 8, 12), (16, 24))
    assert ours.num_places("unet.mid_block.attentions.0.proj_in.weight") == 4 * 6
    drawn = ours.draw(PROMPTS, SEEDS, STEPS, GUIDANCE)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
    ).images
    assert drawn.shape == (2, 3, 16, 24)
    assert_close(drawn, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pipeline_class", [DiffusionPipeline, StableDiffusionPipeline])
def test_a_saved_pipeline_makes_the_same_pictures_in_diffusers(
    pipeline_class: type[DiffusionPipeline], components: StableDiffusion, tmp_path: Path
) -> None:
    original = pictures(components)
    with torch.no_grad():
        components.text_encoder.encoder.layers[2].mlp.fc2.weight.mul_(-1)
        components.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(-1)
    edited = pictures(components)
    components.save(tmp_path / "edited")
    pipeline = pipeline_class.from_pretrained(tmp_path / "edited")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    # The same arithmetic, but convolutions in another memory layout: rounding only, far below one grey level in 255.
    assert_close(theirs, edited, rtol=0, atol=1e-3)
    assert (edited - original).abs().max() > 1e-2


def test_what_was_saved_loads_again_with_every_weight(components: StableDiffusion, tmp_path: Path) -> None:
    components.save(tmp_path / "copy")
    again = load_pipeline(str(tmp_path / "copy"))
    for name, parameter in components.named_parameters().items():
        assert torch.equal(again.named_parameters()[name], parameter), name
    assert again.scheduler.config == components.scheduler.config
