"""``lit-unlearn compare``: prompts with several edits on one page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lit_unlearn import cli
from lit_unlearn.commands.compare import prompts_of


def pixels(picture: str | Path) -> bytes:
    """The pixels of a file, or of an address with the picture in it."""
    return Image.open(picture if isinstance(picture, Path) else io.BytesIO(base64.b64decode(picture))).tobytes()


def test_pictures_are_those_that_generate_draws(
    run_folder: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["compare", str(run_folder), "--prompts", "a dog", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "compare.html\n"
    page = Path("compare.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(shown) == 3  # unedited, edited, difference
    common = ["generate", "a dog", "--seed", "3", "--scale", "1"]
    assert cli.main([*common, "--model", str(tiny_sd), "--num_inference_steps", "2", "-o", "before.png"]) == 0
    assert cli.main([*common, "--ckpt_path", checkpoint, "-o", "after.png"]) == 0
    assert [pixels(text) for text in shown[:2]] == [pixels(Path("before.png")), pixels(Path("after.png"))]
    assert "null_space: dog" in page
    assert len(re.findall(r">\s*dog: (?:yes|no) [01]\.\d\d<", page)) == 2


def test_two_edits_of_one_name_are_told_apart_and_files_of_prompts_read(run_folder: Path) -> None:
    checkpoint = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["export", "--ckpt_path", checkpoint, "--delta", "-o", "dog.safetensors"]) == 0
    Path("prompts.txt").write_text("a dog\n\n  a cat in the rain \n", encoding="utf-8")
    given = ["compare", str(run_folder), checkpoint, "--prompts", "prompts.txt", "--num", "2"]
    assert cli.main(given) == 0
    page = Path("compare.html").read_text(encoding="utf-8")
    assert page.count(f"({checkpoint})") >= 2
    assert page.count('<th scope="row">') == 4
    assert cli.main(given) == 2  # nothing is overwritten


def test_prompts_are_given_or_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert prompts_of(["a dog", str(file)]) == ["a dog", "one", "two"]
    table = tmp_path / "theirs.csv"
    table.write_text('prompt,evaluation_seed\n"a nude, sitting",3\n', encoding="utf-8")
    assert prompts_of([str(table)]) == ["a nude, sitting"]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no prompt"):
        prompts_of([str(file)])
    with pytest.raises(ValueError, match="cannot be read"):
        prompts_of(["none.txt"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num", "0"], "num=0 must be at least 1."),
        (["--num", "401", "--prompts", "a"], "give at most 400."),
        (["-o", "x.png"], "x.png"),
        (["--prompts", "none.txt"], "cannot be read"),
    ],
)
def test_bad_input(run_folder: Path, refuses: Callable[..., str], args: list[str], message: str) -> None:
    assert message in refuses("compare", str(run_folder), *args)


def test_runs_with_other_settings_need_a_choice(
    recipe: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--method", "other", "--model.num_inference_steps", "3", "--model.guidance_scale", "2"]
    assert cli.main(["fit", "--config", str(recipe), *other]) == 0
    capsys.readouterr()
    runs = [str(run_folder), "logs/other/dog/version_0"]
    assert cli.main(["compare", *runs]) == 2
    assert "The runs have num_inference_steps 2, 3: choose one with --num_inference_steps." in capsys.readouterr().err
    assert cli.main(["compare", *runs, "--num_inference_steps", "2", "--guidance_scale", "3"]) == 0
    assert "2 denoising steps, guidance 3." in Path("compare.html").read_text(encoding="utf-8")
