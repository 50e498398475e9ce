"""Pictures by ``generate``, and the demo."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from helpers import assert_alike, metadata, read_picture
from lit_unlearn import cli
from lit_unlearn.diffusion.sampling import initial_noise
from lit_unlearn.edits.checkpoint import read_edit

STEPS = 2
"""Denoising steps of every picture, as in the recipe."""


def test_generate_draws_what_diffusers_draws(workplace: Path, tiny_sd: Path) -> None:
    options = ["--model", str(tiny_sd), "--num_inference_steps", str(STEPS), "--scale", "1", "--seed", "3"]
    assert cli.main(["generate", "a dog", "-o", "new/dog.png", *options]) == 0
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    latents = initial_noise(pipeline.unet, [3])
    expected = pipeline("a dog", num_inference_steps=STEPS, guidance_scale=4.0, latents=latents).images[0]
    assert_alike(read_picture("new/dog.png"), expected)


def test_generate_enlarges_small_pictures_and_labels_many(workplace: Path, tiny_sd: Path) -> None:
    options = ["--model", str(tiny_sd), "--num_inference_steps", "1"]
    assert cli.main(["generate", "a dog", "-o", "one.png", *options]) == 0
    assert read_picture("one.png").size == (256, 256)
    assert cli.main(["generate", "a dog", "a cat", "--num", "3", "-o", "grid.png", *options]) == 0
    width, height = read_picture("grid.png").size
    assert width > 3 * 256
    assert height > 2 * 256


def test_generate_applies_the_edit(run_folder: Path, recipe: Path, tiny_sd: Path) -> None:
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "delta.safetensors", "--delta"]) == 0
    edited = load_file("delta.safetensors")
    save_file(
        {name: value * 3 for name, value in edited.items()},
        "stronger.safetensors",
        metadata=metadata("delta.safetensors"),
    )
    for path in (ckpt_path, "delta.safetensors", "stronger.safetensors"):
        args = ["generate", "a dog", "-o", f"{Path(path).stem}.png", "--ckpt_path", path]
        if path != ckpt_path:  # a delta does not say where its base lies
            assert cli.main(args) == 2
            args += ["--model", str(tiny_sd)]
        assert cli.main(args) == 0
    assert (
        cli.main(["generate", "a dog", "-o", "plain.png", "--model", str(tiny_sd), "--num_inference_steps", str(STEPS)])
        == 0
    )
    assert Path("last.png").read_bytes() == Path("delta.png").read_bytes()
    assert Path("stronger.png").read_bytes() != Path("plain.png").read_bytes()


def test_generate_writes_no_picture_that_is_not_finite(
    broken_model: Callable[..., Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(folder: Path) -> None:
        file = folder / "vae/diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["decoder.conv_in.weight"].fill_(3e38)
        save_file(weights, file, metadata={"format": "pt"})

    model = str(broken_model(damage))
    assert cli.main(["generate", "a dog", "-o", "a.png", "--model", model, "--num_inference_steps", "1"]) == 2
    assert "are not finite" in capsys.readouterr().err
    assert not Path("a.png").exists()


@pytest.mark.parametrize("option", ["--model", "--ckpt_path"])
def test_an_empty_name_is_not_taken_as_none(option: str, workplace: Path, refuses: Callable[..., str]) -> None:
    assert f"{option.removeprefix('--')}=" in refuses("generate", "a dog", "-o", "a.png", option, "")


def test_generate_warns_of_a_prompt_that_is_cut_off(workplace: Path, tiny_sd: Path) -> None:
    prompt = "a dog in the rain " * 20
    with pytest.warns(UserWarning, match=f"The prompt '{prompt}' has"):
        assert cli.main(["generate", prompt, "-o", "a.png", "--model", str(tiny_sd), "--num_inference_steps", "1"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "there.png"], "output=there.png exists: choose another name, or pass --overwrite"),
        (["-o", "a.jpg"], "output=a.jpg must end in .png"),
        (["-o", "a.png", "--num", "0"], "num=0 must be at least 1"),
        (["-o", "a.png", "--device", "abacus"], "device='abacus' cannot be used here"),
        (["-o", "a.png", "--ckpt_path", "nowhere"], "ckpt_path=nowhere does not exist"),
        (["-o", "a.png", "--model", "nowhere"], "model='nowhere' is no folder and no hub id"),
        (["-o", "a.png", "--nmu", "2"], "generate: unrecognized arguments: --nmu 2 (closest: --num)."),
        (["-o", "folder.png", "--overwrite"], "output=folder.png is a folder, but names a file"),
        (["esd.csv", "-o", "a.png"], "The prompt 'esd.csv' is a file, which is not read: give the prompts"),
    ],
)
def test_bad_input_of_generate(refuses: Callable[..., str], args: list[str], message: str) -> None:
    Path("there.png").touch()
    Path("folder.png").mkdir()
    Path("esd.csv").touch()
    assert refuses("generate", "a dog", *args).startswith(message)


def test_the_demo_says_what_it_does_and_where_it_lies(
    workplace: Path, recipe: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--concept", "owl", "--config", str(recipe), "--model", str(tiny_sd)]) == 0
    text = capsys.readouterr().out
    folder = "logs/null_space/owl/version_0"
    ckpt_path = f"{folder}/checkpoints/last.ckpt"
    options = f"--config {recipe} --concept owl --model {tiny_sd}"
    for line in (
        f"$ lit-unlearn fit {options}",
        f"$ lit-unlearn test {options} --ckpt_path {ckpt_path}",
        f"$ lit-unlearn export --ckpt_path {ckpt_path} --output {folder}/pipeline",
        "tensorboard --logdir logs",
    ):
        assert f"{line}\n" in text
    steps = read_edit(ckpt_path).hyper_parameters["num_inference_steps"]  # those of the command with the checkpoint
    assert steps != 15  # the default without one
    assert re.search(rf"generate '.*' --ckpt_path {ckpt_path} --output edited.png\n", text)
    assert re.search(rf"generate '.*' --model {tiny_sd} --num_inference_steps {steps} --output unedited.png\n", text)
    for name in ("grid.png", "scores.json", "pipeline"):
        assert f"{folder}/{name}" in text
        assert Path(folder, name).exists()
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["export", "--ckpt_path", "a", "-o", "model.safetensors"],
            "output='model.safetensors' is the name of a file",
        ),
        (["export", "--ckpt_path", "a", "--delta", "-o", "x.ckpt"], "output=x.ckpt names a .ckpt file, but"),
        (["report", "logs", "-o", "report.html"], "output=report.html names a .html file, but"),
        (["report", "logs", "-o", "plain"], "output=plain is a file, but what is written is a folder"),
        (["attack", "--ckpt_path", "a", "-o", "attacks.json"], "output=attacks.json names a .json file, but"),
        (["demo", "--concept", "dog", "--concept", "cat"], "demo: --concept is given twice and takes one value."),
    ],
)
def test_what_no_command_can_write_is_refused(refuses: Callable[..., str], args: list[str], message: str) -> None:
    for name in ("plain", "a"):
        Path(name).touch()
    assert refuses(*args).startswith(message)
