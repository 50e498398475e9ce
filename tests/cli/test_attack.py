"""``lit-unlearn attack`` on a tiny run whose judge sees dogs everywhere."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_unlearn import cli
from lit_unlearn.attacks import run as attack
from lit_unlearn.attacks.relearning import Relearning
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.new_tokens import read_embeddings
from lit_unlearn.diffusion.vocabulary import vocabulary_of
from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit
from lit_unlearn.edits.judging import concept_set_of_edit
from lit_unlearn.reports.attack_results import AttackReport

SMALL = ["--steps", "2", "--num_pictures", "2"]


def test_a_run_is_attacked_in_its_folder(
    run_folder: Path,
    judge: str,
    tiny_sd: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or the table wraps its headings
    ckpt_path = run_folder / "checkpoints/last.ckpt"
    checkpoint = ckpt_path.read_bytes()
    args = ["attack", "--ckpt_path", str(ckpt_path), "--judge", judge, *SMALL]
    assert cli.main([*args, "--attacks", "relearning", "ring_a_bell"]) == 0
    assert cli.main([*args, "--attacks", "concept_inversion", "prompt_search"]) == 0  # added to the others
    assert ckpt_path.read_bytes() == checkpoint
    report = AttackReport.load(run_folder / "attacks.json")
    assert (report.method, report.concepts, report.checkpoint) == ("null_space", ["dog"], str(ckpt_path))
    names = ["relearning", "ring_a_bell", "concept_inversion", "prompt_search"]
    assert [result.attack for result in report.attacks] == names
    for result in report.attacks:
        assert (result.pictures, result.pre_attack, result.shown, result.unedited) == (2, 1.0, 1.0, 1.0)
        assert result.settings["steps"] == 2
        assert result.settings["num_inference_steps"] == 2  # as in the run
        assert result.seconds > 0
        with Image.open(run_folder / f"attacks/dog_{result.attack}.png") as grid:
            assert grid.size[0] > 2 * 96
            assert grid.size[1] > 3 * 96
    found = {result.attack: result for result in report.attacks}
    assert found["ring_a_bell"].unet_forwards == 0
    assert found["prompt_search"].unet_backwards == 2 * 8
    embeddings, metadata = read_embeddings(run_folder / found["concept_inversion"].found)
    assert embeddings.shape == (1, 32)
    assert metadata["concept"] == "dog"
    assert metadata["vocabulary"] == vocabulary_of(str(tiny_sd))[0]
    out = capsys.readouterr().out
    assert "dog: relearning: back after 1 steps" in out
    assert "under attack" in out

    # Again: only on request, and the same is found.
    assert cli.main([*args, "--attacks", "ring_a_bell"]) == 2
    assert f"{run_folder}/attacks.json has a result of ring_a_bell on dog" in capsys.readouterr().err
    assert cli.main([*args, "--attacks", "ring_a_bell", "--overwrite"]) == 0
    again = AttackReport.load(run_folder / "attacks.json")
    assert [result.attack for result in again.attacks] == names
    assert again.attacks[1].found == report.attacks[1].found
    assert again.attacks[1].seconds != report.attacks[1].seconds


def test_variants_have_results_of_their_own(run_folder: Path, judge: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["attack", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--judge", judge]
    args += ["--num_pictures", "2", "--attacks", "prompt_search", "relearning"]
    assert cli.main([*args, "--steps", "1", "--restarts", "2"]) == 0
    assert "restarts=2 has no effect on relearning, without a random start." in capsys.readouterr().out
    variants = ["--prompt_search.per_prompt", "true", "--relearning.parts", "all", "--relearning.rank", "2"]
    assert cli.main([*args, *variants, "--budget", "0.02"]) == 0
    # The judge sees dogs everywhere, so that there is nothing else to learn from.
    assert cli.main([*args[:-2], "relearning", "--relearning.pictures", "others"]) == 2
    assert "sees it in all of 40 pictures of retained concepts" in capsys.readouterr().err
    results = {result.attack: result for result in AttackReport.load(run_folder / "attacks.json").attacks}
    assert list(results) == ["prompt_search", "relearning", "prompt_search_each", "relearning_rank2_all"]
    starts = results["prompt_search"].settings["starts"]
    assert [start["shown"] for start in starts] == [1.0, 1.0]
    assert results["prompt_search"].settings["kept"] == 1 + (starts[1]["loss"] < starts[0]["loss"])
    assert results["prompt_search"].settings["restarts"] == 2
    assert "restarts" not in results["relearning"].settings
    assert results["prompt_search_each"].settings["steps"] == 2
    assert results["prompt_search_each"].settings["looks"] == [1, 1]
    assert results["relearning_rank2_all"].settings["rank"] == 2
    assert (run_folder / "attacks/dog_prompt_search_each.png").is_file()


PROBES = ["completion", "image_to_image", "inpainting", "inversion", "noise_probe", "prompt_levels"]


def test_probes_and_other_settings_stand_beside_each_other(
    run_folder: Path, judge: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ckpt_path = run_folder / "checkpoints/last.ckpt"
    args = ["attack", "--ckpt_path", str(ckpt_path), "--judge", judge, "--num_pictures", "2"]
    quick = ["--completion.sampler_steps", "2", "--completion.share", "0.5", "--inversion.sampler_steps", "1"]
    quick += ["--noise_probe.scales", "[1, 1.5]", "--prompt_levels.pictures", "1"]
    assert cli.main([*args, "--attacks", *PROBES, *quick]) == 0
    report = AttackReport.load(run_folder / "attacks.json")
    assert [result.attack for result in report.attacks] == PROBES
    for result in report.attacks:
        assert (result.pictures, result.pre_attack, result.shown, result.unedited) == (2, 1.0, 1.0, 1.0)
        assert result.seconds > 0 and result.unet_forwards > 0 == result.unet_backwards
        assert all(share == 1.0 for share in result.controls.values())
        with Image.open(run_folder / f"attacks/dog_{result.attack}.png") as grid:
            assert grid.size[1] > (3 + len(result.controls)) * 96
    assert [len(result.controls) for result in report.attacks] == [3, 2, 2, 2, 1, 0]
    assert report.attacks[4].settings["scales"] == [1.0, 1.5]

    # Another guidance, another negative prompt: results of their own, and no file is replaced.
    files = {path: path.read_bytes() for path in (run_folder / "attacks").iterdir()}
    args += ["--attacks", "prompt_levels", "--prompt_levels.pictures", "1"]
    assert cli.main([*args, "--guidance_scale", "1"]) == 0
    assert cli.main([*args, "--negative_prompt", "a cat"]) == 0
    out = capsys.readouterr().out
    assert "prompt_levels, guidance 1 " in out
    assert "prompt_levels, negative prompt 'a cat' " in out
    now = AttackReport.load(run_folder / "attacks.json").attacks
    assert now[:6] == report.attacks
    assert [(r.settings["guidance_scale"], r.settings["negative_prompt"]) for r in now[5:]] == [
        (4.0, None),
        (1.0, None),
        (4.0, "a cat"),
    ]
    assert all(path.read_bytes() == content for path, content in files.items())
    assert (run_folder / "attacks/dog_prompt_levels_guidance1.png").is_file()
    assert (run_folder / "attacks/dog_prompt_levels_without_a_cat.png").is_file()
    assert cli.main([*args, "--guidance_scale", "1"]) == 2
    assert "has a result of prompt_levels on dog with guidance 1: pass --overwrite" in capsys.readouterr().err


def test_from_python_what_is_there_is_kept(run_folder: Path, judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt_path = run_folder / "checkpoints/last.ckpt"
    mine = Relearning(steps=1, threshold=0.9)
    (first,) = attack.attack_run(ckpt_path, [mine], num_pictures=2, judge=judge)
    assert first.settings["threshold"] == 0.9

    def loaded(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(attack, "load_with_pretrained", loaded)
    assert attack.attack_run(ckpt_path, ["relearning"], existing="keep") == [first]


def test_a_delta_needs_a_folder(run_folder: Path, judge: str, workplace: Path, tiny_sd: Path) -> None:
    ckpt_path = str(run_folder / "checkpoints/last.ckpt")
    assert cli.main(["export", "--ckpt_path", ckpt_path, "--output", "delta.safetensors", "--delta"]) == 0
    args = ["attack", "--ckpt_path", "delta.safetensors", "--judge", judge, "--attacks", "ring_a_bell", *SMALL]
    args += ["--model", str(tiny_sd)]
    assert cli.main([*args, "--output", "found"]) == 0
    assert AttackReport.load("found/attacks.json").method == "ValueRefinement"
    assert not (run_folder / "attacks.json").exists()


def test_a_delta_has_its_own_concept_set(recipe: Path, workplace: Path, pets: str, tiny_sd: Path) -> None:
    steps = ["--data.steps", "1", "--model.concept_set", pets]
    assert cli.main(["fit", "--config", str(recipe), *steps, "--model.judge", "clip"]) == 0
    (ckpt_path,) = Path("logs").rglob("last.ckpt")
    assert cli.main(["export", "--ckpt_path", str(ckpt_path), "-o", "d.safetensors", "--delta"]) == 0
    edit = read_edit("d.safetensors")
    assert edit.hyper_parameters["concept_set"] == Path(pets).name
    assert concept_set_of_edit(edit).content() == load_concept_set(pets).content()


def test_pictures_of_retained_concepts_need_some(run_folder: Path) -> None:
    edit, emoji = read_edit(run_folder / "checkpoints/last.ckpt"), load_concept_set("emoji20")
    learner = Relearning(pictures="others")
    assert attack._other_prompts([Relearning(), learner], edit, emoji) == emoji.retain_prompts(["dog"])
    assert attack._other_prompts([Relearning()], edit, emoji) == []
    with pytest.raises(ValueError, match=r"relearning learns from pictures of retained concepts, and 'emoji20' has no"):
        attack._other_prompts([learner], replace(edit, concepts=list(emoji.concepts)), emoji)


def test_a_budget_is_for_attacks_by_name(run_folder: Path) -> None:
    with pytest.raises(ValueError, match="budget=2 has no effect on attacks with settings of their own"):
        attack.attack_run(run_folder / "checkpoints/last.ckpt", [Relearning()], budget=2)


def test_both_states_of_the_weights(run_folder: Path, tiny_sd: Path) -> None:
    edit = read_edit(run_folder / "checkpoints/last.ckpt")
    components, pretrained = load_with_pretrained(BaseModel.find(str(tiny_sd)), edit)
    parameters, base = components.named_parameters(), load_pipeline(str(tiny_sd)).named_parameters()
    for name in edit.weights:
        assert torch.equal(parameters[name], edit.weights[name])
        assert not torch.equal(parameters[name], base[name])
    with pretrained.restored():
        assert all(torch.equal(parameters[name], base[name]) for name in base)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attacks", "prompt_serch"], "attacks='prompt_serch' is no attack (closest: prompt_search)."),
        (["--concept", "cat"], "concept='cat' was not edited by logs/null_space/dog/version_0/checkpoints/last.ckpt"),
        (["--concept", "dgo"], "The concept set 'emoji20' has no concept 'dgo'; closest names: dog"),
        (["--num_pictures", "0"], "num_pictures=0 must be at least 1."),
        (["--steps", "-3"], "steps=-3 must be at least 1."),
        (["--budget", "-2"], "budget=-2 must be a positive number."),
        (["--budget", "2", "--steps", "9"], "budget=2 multiplies the default steps, and steps=9 sets them: give one."),
        (["--restarts", "0"], "restarts=0 must be at least 1."),
        (["--attacks", "relearning", "--restarts", "3"], "restarts=3 has no effect on relearning, without a random"),
        (["--attacks", "relearning", "--relearning.rank", "99"], "relearning.rank=99 must be less than 32, the full"),
        (["--attacks", "relearning", "--relearning.rank", "0"], "relearning.rank=0 must be at least 1."),
        (["--attacks", "relearning", "--relearning.pictures", "dogs"], "relearning.pictures: "),
        (["--attacks", "prompt_search", "--prompt_search.per_prompt", "maybe"], "prompt_search.per_prompt: "),
        (["--seed", "-1"], "seed=-1 must be zero or larger."),
        (["--judge", "lava"], "judge='lava' is no judge and no folder (closest: llava)."),
        (["--model", "nowhere"], "model='nowhere' is no folder and no hub id"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
        (["--output", "logs/null_space/dog/version_0/config.yaml"], "output=logs/null_space/dog/version_0/config.yaml"),
        (["--attcks", "all"], "attack: unrecognized arguments: --attcks all"),
        (
            ["--judge", "gpt"],
            "judge='gpt' is no judge and no folder: take clip, emoji, emoji_second, llava, nudenet, the folder",
        ),
        (["--judge", "nudenet"], "judge='nudenet' cannot answer 'Is there a dog in this picture?' (it answers only"),
        (["--judge", "none_such.Judge"], "judge='none_such.Judge' cannot be imported: there is no none_such"),
        (["--judge", "emoji", "--judge_options.batch_size", "2"], "judge_options.batch_size is unknown to emoji"),
        (["--judge", "clip", "--judge_options.batch_size=many"], "judge_options.batch_size: int expected, got many."),
        (["--attacks", "none_such.Attack"], "attacks='none_such.Attack' cannot be imported: there is no none_such"),
        (
            ["--attacks", "relearning", "--relearning.step", "2"],
            "relearning.step is unknown to relearning: it has steps",
        ),
        (["--attacks", "relearning", "--ring_a_bell.steps=2"], "ring_a_bell.steps is given, and ring_a_bell is not"),
        (["--attacks", "relearning", "--relearning.steps"], "attack: --relearning.steps expects a value."),
        (["--relearning.threshold=2"], "relearning.threshold=2.0 must be larger than 0 and at most 1."),
        (["--attacks", "relearning", "--allow_names"], "allow_names has no effect on relearning"),
        (["--attacks", "completion", "--steps", "2"], "steps=2 has no effect on completion"),
        (["--guidance_scale", "-1"], "guidance_scale=-1.0 must be zero or larger; 1 means no guidance."),
        (["--negative_prompt", ""], "negative_prompt='' is the empty prompt, which is used anyway: leave it out."),
        (
            ["--guidance_scale", "1", "--negative_prompt", "a cat"],
            "negative_prompt='a cat' has no effect with guid",
        ),
        (
            ["--attacks", "image_to_image", "--image_to_image.strength", "0.3"],
            "image_to_image.strength=0.3 of num_",
        ),
        (
            ["--attacks", "inversion", "--inversion.null_text_steps", "1", "--guidance_scale", "1"],
            "inversion.null_text",
        ),
        (
            ["--attacks", "noise_probe", "--noise_probe.scales", "[1, 0]"],
            "noise_probe.scales=(1.0, 0.0) must be",
        ),
    ],
)
def test_bad_input(run_folder: Path, refuses: Callable[..., str], args: list[str], message: str) -> None:
    assert refuses("attack", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), *args).startswith(message)


def test_a_checkpoint_that_is_none_or_lies_alone(run_folder: Path, refuses: Callable[..., str]) -> None:
    assert refuses("attack", "--ckpt_path", "nowhere").startswith("ckpt_path=nowhere does not exist")
    shutil.copy(run_folder / "checkpoints/last.ckpt", "moved.ckpt")
    expected = "ckpt_path=moved.ckpt does not lie in a run's folder: say with --output where to write."
    assert refuses("attack", "--ckpt_path", "moved.ckpt") == expected


def test_results_of_another_edit_are_not_mixed(run_folder: Path, refuses: Callable[..., str]) -> None:
    AttackReport(method="esd", concepts=["cat"], checkpoint="x.ckpt", attacks=[]).save(run_folder / "attacks.json")
    message = refuses("attack", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"))
    assert message.startswith("logs/null_space/dog/version_0/attacks.json is about an edit of cat")


def test_a_judge_without_the_question(run_folder: Path, judge: str, refuses: Callable[..., str]) -> None:
    config = json.loads((Path(judge) / "config.json").read_text(encoding="utf-8"))
    config["questions"] = {"Is there an owl?": ["subject", "owl"]}
    (Path(judge) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = refuses("attack", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--judge", judge)
    assert "cannot answer 'Is there a dog in this picture?'" in message


MINE = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lit_unlearn.attacks.base import Attack, Found

Path("imported").touch()


@dataclass(frozen=True, kw_only=True)
class Repeat(Attack):
    name: ClassVar[str] = "repeat"
    learns_from_pictures: ClassVar[bool] = False
    word: str = "very"
    times: int = 1

    def search(self, model):
        prefix = " ".join([self.word] * self.times)
        return Found(prefix, lambda prompts, seeds: model.draw([f"{prefix} {prompt}" for prompt in prompts], seeds))


class Always:
    def __init__(self, answer: float = 1.0):
        self.name, self.answer = f"always {answer}", answer

    def __call__(self, images, questions):
        return torch.full((len(images),), self.answer)
"""


@pytest.fixture
def mine(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, ``my_things``, that leaves a trace when it is imported."""
    (workplace / "my_things.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.delitem(sys.modules, "my_things", raising=False)


def test_own_attacks_and_judges_by_import_path(run_folder: Path, mine: None) -> None:
    args = ["attack", "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"), "--num_pictures", "2"]
    args += ["--attacks", "my_things.Repeat", "ring_a_bell", "--repeat.times", "3", "--repeat.word=so"]
    args += ["--ring_a_bell.steps", "1", "--ring_a_bell.num_tokens", "2"]
    assert cli.main([*args, "--judge", "my_things.Always", "--judge_options.answer", "0.75"]) == 0
    own, ring = AttackReport.load(run_folder / "attacks.json").attacks
    assert (own.attack, own.found, own.shown) == ("repeat", "so so so", 1.0)
    assert (own.settings["word"], own.settings["times"], own.settings["judge"]) == ("so", 3, "always 0.75")
    assert (ring.settings["steps"], ring.settings["num_tokens"]) == (1, 2)
    assert (run_folder / "attacks/dog_repeat.png").is_file()


def test_a_checkpoint_s_own_judge_is_not_imported_unasked(
    run_folder: Path, mine: None, refuses: Callable[..., str]
) -> None:
    ckpt_path = run_folder / "checkpoints/last.ckpt"
    checkpoint = torch.load(ckpt_path, weights_only=True)
    checkpoint["hyper_parameters"] |= {"judge": "my_things.Always", "judge_options": {"answer": 1.0}}
    torch.save(checkpoint, ckpt_path)
    message = refuses("attack", "--ckpt_path", str(ckpt_path), "--attacks", "ring_a_bell", *SMALL)
    assert "names the judge 'my_things.Always', whose code is not part of lit-unlearn: pass --judge my_th" in message
    assert not Path("imported").exists()
    # Named by the user it is, as far as to find out that it has no such option.
    args = ["--judge", "my_things.Always", "--judge_options.question", "1"]
    assert cli.main(["attack", "--ckpt_path", str(ckpt_path), *args, *SMALL]) == 2
    assert Path("imported").exists()


def test_what_there_is_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attack", "--attacks.help"]) == 0
    listed = capsys.readouterr().out
    for word in (
        "ring_a_bell: Finds, for each direct prompt, other words",
        "--ring_a_bell.strength",
        "--relearning.threshold",
        "0.5)",
    ):
        assert word in listed
    assert cli.main(["attack", "--judge.help"]) == 0
    listed = capsys.readouterr().out
    for word in ("emoji: ", "llava: Answers questions with LLaVA-1.5", "--judge_options.min_answer", "nudenet: "):
        assert word in listed
    assert "concepts" not in listed.replace("the concepts of a kind", "")
