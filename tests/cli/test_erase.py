"""``lit-unlearn erase`` and ``concepts``: from a name to an edited model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lit_unlearn import cli
from lit_unlearn.commands.erase import parser, request_of
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.training.erasure import check_drawn, plan_of
from lit_unlearn.training.recipes import resolve_recipes


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_dry_run_says_what_it_takes_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["erase", "parrot", "--to", "owl", "--protect", "tulip", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "parrot (object), to draw owl instead" in said
    assert "judge     emoji" in said
    assert "draw      10 pictures for a look at the unedited model, then 2 x 440, 8 steps each" in said
    assert not list(tmp_path.iterdir())


def test_dry_run_on_another_model(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text("prompt,sd_seed\nmy garden,3\n", encoding="utf-8")
    given = ["erase", "l'été à Arles", "--to", "the winter", "--kind", "style", "--model", str(tiny_sd), "--dry_run"]
    assert cli.main([*given, "--method", "uce", "--protect", "Monet, 北斎", "--retain", "mine.csv"]) == 0
    said = capsys.readouterr().out
    assert "method    uce\n" in said
    assert "judge     clip" in said
    assert "12 concepts, which are judged too" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["", "--to", "cat"], "concept='' has nothing that can be read"),
        (["dog", "--to", "a Dog"], "to='a Dog' is the concept itself"),
        (["dog", "--to", "cat", "--protect", "dog"], "protect='dog' is what is to be erased"),
        (["dog", "--to", "cat", "--kind", "beast"], "kind='beast' is not one of object, person"),
        (["unicorn", "--to", "cat"], "does not draw it, so there is nothing to erase"),
        (["dog", "--to", "cat", "--output", "taken"], "output=taken exists"),
        (["dog", "--to", "cat", "--method", "siss"], "method='siss' is not a recipe that edits a concept"),
        (["dog", "--to", "cat", "--judge", "gpt"], "judge='gpt' is no judge"),
        (["dog", "--to", "cat", "--retain", "none.csv"], "retain=none.csv cannot be read"),
        (["dog", "--model", "x"], "to is missing"),
        (["dog", "--to", "cat", "--num_inference_steps", "0"], "num_inference_steps=0 must be at least 1"),
    ],
)
def test_bad_input_is_told_in_a_sentence(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").mkdir()
    assert cli.main(["erase", *given]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["taken"]


class Never:
    """A judge that sees nothing."""

    name = "never"

    def __call__(self, images: torch.Tensor, questions: list[str]) -> torch.Tensor:
        return torch.zeros(len(images))


def test_concept_that_the_model_does_not_draw_is_refused_before_a_fit(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_unlearn.judges.load.load_judge", lambda *_: Never())
    given = ["erase", "Mickey Mouse", "--to", "a mouse", "--kind", "character", "--model", str(tiny_sd)]
    assert cli.main([*given, "--num_inference_steps", "1"]) == 2
    said = "shows Mickey Mouse on 0 of 10 pictures of its prompts, so there is nothing to erase"
    assert said in capsys.readouterr().err
    assert not Path("logs").exists()


def test_judge_that_cannot_be_loaded_leaves_the_edit_unjudged_unless_it_was_named(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("clip is not there")

    monkeypatch.setattr("lit_unlearn.judges.load.load_judge", fail)
    given = ["dog", "--to", "cat", "--model", str(tiny_sd)]
    assert check_drawn(plan_of(request_of(parser().parse_args(given)))).judge is None
    assert "nothing is judged: clip is not there" in capsys.readouterr().err
    with pytest.raises(OSError, match="clip is not there"):
        check_drawn(plan_of(request_of(parser().parse_args([*given, "--judge", "clip"]))))


def test_names_of_any_script_reach_a_fit_whole() -> None:
    names = ["Mickey Mouse", "l'été", "O'Brien: a life", "ミッキー、マウス", "[x]"]
    args = ["fit", "--config", "uce.yaml", *(part for name in names[:-1] for part in ("--concept", name))]
    resolved = resolve_recipes(args)
    assert yaml.safe_load(resolved[resolved.index("--concept") + 1]) == names[:-1]


def test_sets_are_written_checked_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["concepts", "new", "Mickey Mouse", "--to", "a cartoon mouse", "--kind", "character", "-o", "mickey.yaml"]
    assert cli.main(given) == 0
    assert cli.main(["concepts", "check", "mickey.yaml"]) == 0
    assert "the set mickey is valid: 11 concepts" in capsys.readouterr().out
    assert cli.main(["concepts", "show", "mickey.yaml", "mickey mouse"]) == 0
    assert "a cartoon mouse waving hello" in capsys.readouterr().out
    assert cli.main(given) == 2
    assert "output=mickey.yaml exists" in capsys.readouterr().err


def test_table_of_artists_becomes_a_set() -> None:
    Path("artists.csv").write_text("artist,to\nVan Gogh,Monet\nHokusai,Degas\n", encoding="utf-8")
    assert cli.main(["concepts", "new", "--table", "artists.csv", "-o", "artists.yaml"]) == 0
    found = load_concept_set("artists.yaml")
    assert [found.get(name).kind for name in ("Van Gogh", "Hokusai")] == ["style", "style"]
    assert cli.main(["concepts", "new", "x", "--table", "artists.csv", "-o", "b.yaml"]) == 2


@pytest.mark.slow
def test_concept_outside_of_the_set_is_erased(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["erase", "parrot", "--to", "owl", "--images_per_prompt", "1"]) == 0
    said = capsys.readouterr().out
    assert "Erased: the edited model shows parrot on" in said
    assert "The same edit again, as a recipe:\n  lit-unlearn fit --config logs/null_space/parrot@erase-" in said
    (scores,) = Path("logs").rglob("scores.json")
    content = json.loads(scores.read_text(encoding="utf-8"))
    assert content["forget"] >= 0.95
    assert content["retain"] >= content["before"]["retain"] - 0.02
    assert (scores.parent / "pipeline" / "model_index.json").is_file()
    assert (scores.parents[1] / "concepts.yaml").is_file()


def test_erasing_on_top_of_an_edit_keeps_and_names_its_concept(
    tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(tiny_sd), "--method", "uce", "--judge", "none", "--num_inference_steps", "2", "--delta"]
    mouse = ["Mickey Mouse", "--to", "a cartoon mouse", "--kind", "character", *given]
    assert cli.main(["erase", *mouse, "--output", "mickey"]) == 0
    assert cli.main(["erase", *mouse, "--base_edit", "mickey/delta.safetensors", "--dry_run"]) == 2
    assert "base_edit=mickey/delta.safetensors edits 'Mickey Mouse' already" in capsys.readouterr().err
    other = ["Donald Duck", "--to", "Mickey Mouse", "--kind", "character", *given]
    assert cli.main(["erase", *other, "--base_edit", "mickey/delta.safetensors", "--dry_run"]) == 2
    assert "to='Mickey Mouse' is edited by base_edit=mickey/delta.safetensors" in capsys.readouterr().err
    duck = ["Donald Duck", "--to", "a cartoon duck", "--kind", "character", *given]
    assert cli.main(["erase", *duck, "--base_edit", "mickey/delta.safetensors", "--output", "both"]) == 0
    assert "as edited by mickey/delta.safetensors" in capsys.readouterr().out
    both, mickey = read_edit("both/delta.safetensors"), read_edit("mickey/delta.safetensors")
    assert [link.concepts for link in both.chain] == [["Mickey Mouse"], ["Donald Duck"]]
    assert all(torch.equal(both.overwritten[f"1/{name}"], value) for name, value in mickey.weights.items())
    (recipe,) = Path("logs/uce").glob("Mickey*Donald*/recipe.yaml")
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["base_edit"] == ["mickey/delta.safetensors"]


@pytest.mark.slow
def test_without_a_judge_the_pictures_are_there_to_look_at(tiny_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["erase", "Mickey Mouse", "--to", "a cartoon mouse", "--kind", "character", "--model", str(tiny_sd)]
    given += ["--method", "uce", "--judge", "none", "--num_inference_steps", "2", "--delta", "--output", "edit"]
    assert cli.main(given) == 0
    assert "Not judged: see" in capsys.readouterr().out
    assert list(Path("logs").rglob("grid.png"))
    assert Path("edit/delta.safetensors").is_file()
