"""``clip_skip`` on the command line: given to a fit, kept with its edit, and refused where it contradicts that."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from helpers import assert_alike, metadata, read_picture
from lit_unlearn import api, cli
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.sampling import initial_noise
from lit_unlearn.edits.base import chosen_base
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.edits.drawing import draw_edit
from lit_unlearn.system.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:edited_parameters='text-fc2' leaves out:UserWarning")

ATTACK = ["--attacks", "noise_probe", "--num_pictures", "2"]
STEPS = ["--num_inference_steps", "2"]
HOW = 'draw with clip_skip=1 in diffusers, in web UIs with "Clip skip" 2, in ComfyUI with CLIP Set Last Layer -2'


def run(*args: str) -> None:
    assert cli.main(list(args)) == 0


@pytest.fixture(scope="module")
def skipped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which dog was edited once with ``clip_skip`` 1; not to be written to."""
    folder = tmp_path_factory.mktemp("skipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("fit", "--config", str(recipe), "--model.clip_skip", "1", "--model.first_layer", "0")
    return folder


@pytest.fixture
def edit(skipped: Path, workplace: Path) -> str:
    """The checkpoint of that edit, in a run's folder below the folder to work in."""
    shutil.copytree(skipped / "logs", workplace / "logs")
    return "logs/null_space/dog/version_0/checkpoints/last.ckpt"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> set[int | None]:
    """The values of ``clip_skip`` that pictures were drawn with."""
    seen: set[int | None] = set()
    sample = StableDiffusion.sample

    def watched(self: StableDiffusion, *args: Any, **options: Any) -> Any:
        seen.add(self.clip_skip)
        return sample(self, *args, **options)

    monkeypatch.setattr(StableDiffusion, "sample", watched)
    return seen


def test_it_is_stored_with_the_edit_and_used_by_every_command(
    edit: str, recipe: Path, judge: str, drawn: set[int | None]
) -> None:
    read = read_edit(edit)
    assert read.clip_skip == read.hyper_parameters["clip_skip"] == 1
    assert {name.split(".")[3] for name in read.weights} == {"0", "1"}  # of 0, 1 and 2
    stored = yaml.safe_load(Path(edit).parents[1].joinpath("config.yaml").read_text(encoding="utf-8"))
    assert stored["model"]["init_args"]["clip_skip"] == 1
    commands = {
        "test": ["--config", str(recipe), "--ckpt_path", edit],
        "predict": ["--config", str(recipe), "--ckpt_path", edit],
        "generate": ["a dog", "--ckpt_path", edit, "-o", "a.png"],
        "compare": [edit, "--prompts", "a dog"],
        "attack": ["--ckpt_path", edit, "--judge", judge, *ATTACK],
    }
    for command, args in commands.items():
        drawn.clear()
        run(command, *args)
        assert drawn == {1}, command
    drawn.clear()
    api.draw(api.Edit(edit), "a dog", device="cpu")
    assert drawn == {1}
    api.score(edit, overwrite=True)
    assert drawn == {1}


def test_generate_draws_as_diffusers(
    edit: str, tiny_sd: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    run("export", "--ckpt_path", edit, "-o", "out")
    run("generate", "a dog", "-o", "edit.png", "--ckpt_path", edit, "--scale", "1")
    run("generate", "a dog", "-o", "model.png", "--model", "out", "--scale", "1", *STEPS, "--clip_skip", "1")
    assert "guidance 4, clip_skip 1, seed 0" in capsys.readouterr().out
    run("generate", "a dog", "-o", "plain.png", "--model", "out", "--scale", "1", *STEPS)
    said = capsys.readouterr()
    assert "clip_skip" not in said.out
    assert said.err.count("out was edited with clip_skip=1, which its pictures need too: give 1 as clip_skip.") == 1
    pipeline = DiffusionPipeline.from_pretrained("out")
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.text_encoder, "text_model"):
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    latents = initial_noise(pipeline.unet, [0])
    expected = pipeline("a dog", num_inference_steps=2, guidance_scale=4.0, latents=latents, clip_skip=1).images[0]
    assert_alike(read_picture("edit.png"), expected)
    assert_alike(read_picture("model.png"), expected)
    assert read_picture("plain.png").tobytes() != read_picture("edit.png").tobytes()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "a dog", "-o", "a.png", "--ckpt_path", "EDIT", "--clip_skip", "2"], r"leave clip_skip out\."),
        (["test", "--config", "RECIPE", "--ckpt_path", "EDIT", "--model.clip_skip", "2"], r"leave model\.clip_skip o"),
        (["fit", "--config", "RECIPE", "--ckpt_path", "EDIT", "--model.clip_skip", "2"], "give what its fit had"),
    ],
)
def test_another_one_than_the_edits_is_refused(
    command: list[str], message: str, skipped: Path, recipe: Path, refuses: Callable[..., str]
) -> None:
    file = skipped / "logs/null_space/dog/version_0/checkpoints/last.ckpt"
    given = [{"EDIT": str(file), "RECIPE": str(recipe)}.get(word, word) for word in command]
    said = refuses(*given)
    assert re.search(f"{re.escape(str(file))} was made with clip_skip=1, and would be used with clip_skip=2: ", said)
    assert re.search(message, said)


def test_a_fit_does_not_go_on_without_it(skipped: Path, recipe: Path, refuses: Callable[..., str]) -> None:
    file = skipped / "logs/null_space/dog/version_0/checkpoints/last.ckpt"
    assert "and would be used without it: give what its fit" in refuses(
        "fit", "--config", str(recipe), "--ckpt_path", str(file)
    )


def test_an_edit_without_it_is_not_tested_with_it(run_folder: Path, recipe: Path, refuses: Callable[..., str]) -> None:
    said = refuses("test", "--config", str(recipe), "--model.clip_skip", "1")
    assert "was made without clip_skip, and would be used with clip_skip=1: leave model.clip_skip out." in said
    with pytest.raises(ValueError, match="was made without clip_skip"):
        chosen_base(None, None, read_edit(run_folder / "checkpoints/last.ckpt"), None, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.clip_skip", "0"], "clip_skip=0 must be a whole number of at least 1"),
        (["--model.clip_skip", "3"], "which has 3 layers, none to read after: give at most 2."),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    args: list[str], message: str, recipe: Path, refuses: Callable[..., str]
) -> None:
    assert message in refuses("fit", "--config", str(recipe), *args)
    number = args[-1]
    model = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]["model"]
    said = refuses("generate", "a dog", "-o", "a.png", "--model", model, "--clip_skip", number)
    assert message in said
    assert message in refuses(
        "erase", "dog", "--to", "cat", "--model", model, "--clip_skip", number, "--judge", "none", "--dry_run"
    )


def test_families_without_it_refuse_it(tiny_pixart: Path, refuses: Callable[..., str]) -> None:
    given = ["--config", "uce", "--model.edited_parameters", "context", "--concept", "dog", "--model.clip_skip", "1"]
    said = refuses("fit", *given, "--model", str(tiny_pixart))
    assert "clip_skip=1 has no effect: model=" in said and said.endswith("draws without it; leave it out.")
    assert "clip_skip=1 has no effect" in refuses("plan", *given, "--model", "flux1_dev")


def test_a_stack_is_read_in_one_way(edit: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["fit", "--config", str(recipe), "--concept", "owl", "--model.first_layer", "0"]
    assert cli.main([*given, "--base_edit", edit]) == 2
    said = capsys.readouterr().err
    assert "was made with clip_skip=1, and would be used without it: give the fit the clip_skip of its base_edi" in said
    run(*given, "--base_edit", edit, "--model.clip_skip", "1")
    on_top = read_edit("logs/null_space/dog+owl/version_0/checkpoints/last.ckpt")
    assert on_top.clip_skip == 1 and [link.config["clip_skip"] for link in on_top.chain] == [1, 1]
    run("undo", "--ckpt_path", str(on_top.path), "--edit", "owl", "-o", "left.safetensors")
    assert read_edit("left.safetensors").clip_skip == 1


def test_edits_that_are_read_otherwise_are_not_compared(
    edit: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished / "logs/null_space/dog/version_0"
    assert cli.main(["compare", edit, str(other), "--prompts", "a dog"]) == 2
    assert "The runs have clip_skip 1, none, which draw otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["folder", "delta", "lora", "single"])
def test_exports_say_how_to_draw(
    form: str,
    edit: str,
    single_file: Callable[..., Path],
    workplace: Path,
    tiny_sd: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = {"delta": ["--delta"], "lora": ["--lora", "auto"]}.get(form, [])
    if form == "single":
        more = ["--format", form, "--single_file", str(single_file(tiny_sd, workplace / "model.safetensors"))]
    output = "out" if form == "folder" else "out.safetensors"
    run("export", "--ckpt_path", edit, "-o", output, *more)
    assert f"{HOW}: an export does not hold it\n" in capsys.readouterr().out
    if form == "folder":
        facts = json.loads(Path("out/provenance.json").read_text(encoding="utf-8"))
        card = Path("out/README.md").read_text(encoding="utf-8")
        assert (
            f"earlier in the text encoder: {HOW}.\n" in card and ', clip_skip=1).images[0].save("castle.png")' in card
        )
    else:
        prefix = "lit_unlearn." if form == "single" else ""
        facts = {n: json.loads(metadata(output)[f"{prefix}{n}"]) for n in ("clip_skip", "drawing", "config")}
    assert (facts["clip_skip"], facts["drawing"], facts["config"]["clip_skip"]) == (1, HOW, 1)
    run("verify", output)
    if form == "delta":
        assert read_edit(output).clip_skip == 1


def test_a_card_draws_the_picture_that_it_shows_how_to_draw(edit: str) -> None:
    run("export", "--ckpt_path", edit, "-o", "out")
    (code,) = re.findall(r"```python\n(.*?)```", Path("out/README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    exec(code, {})
    assert Path("castle.png").is_file()


def test_an_export_without_it_says_nothing_of_it(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("export", "--ckpt_path", str(run_folder), "-o", "out")
    facts = Path("out/provenance.json").read_text(encoding="utf-8")
    assert "drawing" not in json.loads(facts) and "clip_skip" not in json.loads(facts)
    assert "clip_skip" not in capsys.readouterr().out + Path("out/README.md").read_text(encoding="utf-8")


def test_a_plan_leaves_out_what_no_prompt_is_read_with(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    given = ["plan", "--config", "null_space", "--model", "sd1", "--concept", "dog", "--model.edited_parameters"]
    run(*given, "text-fc2", "--model.clip_skip", "2")
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "Left out, since no prompt is read with them at clip_skip=2: text_encoder.encoder.layers.10.mlp.fc2" in printed
    )
    assert "layers.11.mlp.fc2" in printed and "layers.9." not in printed


def test_erase_writes_it_into_the_recipe(tiny_sd: Path, workplace: Path) -> None:
    from lit_unlearn.commands.erase import parser, request_of
    from lit_unlearn.training.erasure import plan_of

    given = ["dog", "--to", "cat", "--model", str(tiny_sd), "--clip_skip", "1", "--judge", "none"]
    plan = plan_of(request_of(parser().parse_args(given)))
    assert plan.recipe["model"]["init_args"]["clip_skip"] == plan.base.clip_skip == 1


def test_python_has_it(recipe: Path, workplace: Path) -> None:
    edit = api.edit("dog", recipe=recipe, clip_skip=1, options={"model.first_layer": 0})
    assert edit.content.clip_skip == 1 and edit.pipeline(device="cpu").clip_skip == 1
    with pytest.raises(UserError, match="clip_skip=0 must be"):
        draw_edit(None, ["a dog"], clip_skip=0)


@pytest.mark.parametrize("form", [[], ["--delta"], ["--lora", "auto"]])
def test_verify_says_how_to_draw(edit: str, tiny_sd: Path, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run("export", "--ckpt_path", edit, "-o", "out" if not form else "out.safetensors", *form)
    for base in ([], ["--base", str(tiny_sd)]):
        capsys.readouterr()
        run("verify", "out" if not form else "out.safetensors", *base)
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == HOW and sum(HOW in line for line in said) == 1


def test_verify_finds_a_clip_skip_that_is_impossible(
    edit: str, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", "--ckpt_path", edit, "-o", "out")
    path = Path("out/provenance.json")
    facts = json.loads(path.read_text(encoding="utf-8"))
    for value, base, what in ((99, [str(tiny_sd)], "which has 3 layers"), ("\x1b[2J", [], "is not a whole number")):
        path.write_text(json.dumps({**facts, "clip_skip": value, "drawing": "run this: \x1b[2J"}), encoding="utf-8")
        capsys.readouterr()
        assert cli.main(["verify", "out", *(word for name in base for word in ("--base", name))]) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert what in said and "damaged or from another model" in said
        assert "\x1b[2J" not in said and "draw with" not in said
    path.write_text(json.dumps({**facts, "drawing": "run this: \x1b[2J"}), encoding="utf-8")
    run("verify", "out")
    assert capsys.readouterr().out.splitlines()[-1] == "draw with clip_skip=1 in diffusers"
