"""An export has what its base had besides the parts that are edited, and what it lacks is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

from helpers import edit_content
from lit_unlearn import cli
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.kept import Kept, kept_of
from lit_unlearn.edits.verify import verify_export

WEIGHTS = "safety_checker/model.safetensors"


def add_safety_checker(folder: Path) -> None:
    """Give a pipeline a safety checker of random weights, which finds nothing, and its feature extractor."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    for parameter in (checker.concept_embeds, checker.special_care_embeds):
        parameter.data.zero_()
    checker.concept_embeds_weights.data.fill_(9.0)
    checker.special_care_embeds_weights.data.fill_(9.0)
    checker.save_pretrained(folder / "safety_checker")
    size = {"height": 8, "width": 8}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": size}
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    change_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],  # as in 2022; transformers has renamed it since
        requires_safety_checker=True,
    )


def change_index(folder: Path, **entries: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def add_files(folder: Path) -> None:
    """Files that people have in such folders: some to be kept, some that are not."""
    for name in ("LICENSE", "License.md", "notes.txt", "scheduler/of_the_paper.json", "tokenizer/special.txt"):
        (folder / name).write_text(f'{{"file": "{name}"}}', encoding="utf-8")
    for name in ("README.md", ".gitattributes", "unet/diffusion_pytorch_model.bin", "handler.py", "id_rsa"):
        (folder / name).write_text("x", encoding="utf-8")
    (folder / "embeddings").mkdir()
    save_file({"<toy>": torch.ones(2, 32)}, folder / "embeddings/toy.safetensors")
    save_file({"model.diffusion_model.out.0.weight": torch.ones(1)}, folder / "sd-v1-4.safetensors")
    save_file(load_file(folder / "unet/diffusion_pytorch_model.safetensors"), folder / "old-unet.safetensors")
    save_file(
        load_file(folder / "unet/diffusion_pytorch_model.safetensors"),
        folder / "unet/diffusion_pytorch_model.non_ema.safetensors",
    )


KEPT = {"LICENSE", "License.md", "notes.txt", "scheduler/of_the_paper.json", "embeddings/toy.safetensors"}
KEPT |= {"tokenizer/special.txt", "safety_checker/config.json", WEIGHTS, "feature_extractor/preprocessor_config.json"}
LEFT_OUT = {"unet/diffusion_pytorch_model.bin", "handler.py", "id_rsa", "sd-v1-4.safetensors", "old-unet.safetensors"}
LEFT_OUT |= {"unet/diffusion_pytorch_model.non_ema.safetensors"}


@pytest.fixture
def base(broken_model: Callable[..., Path]) -> Path:
    """A pipeline with all of that."""

    def add(folder: Path) -> None:
        add_safety_checker(folder)
        add_files(folder)

    return broken_model(add)


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Exports an edit of a base model as a folder."""

    def run(base: Path, *options: str) -> Path:
        torch.save(edit_content(base, lambda value: value + 0.5), tmp_path / "edit.ckpt")
        command = ["export", "--ckpt_path", str(tmp_path / "edit.ckpt"), "-o", str(tmp_path / "out"), *options]
        assert cli.main(command) == 0
        return tmp_path / "out"

    return run


def found(folder: Path) -> Kept:
    base = BaseModel.find(str(folder))
    return kept_of(base, base.names)


def wrong(path: Path, base: Path) -> list[str]:
    return [line for finding in verify_export(path, BaseModel.find(str(base))) for line in finding.wrong]


def test_an_export_checks_pictures_as_its_base_does(base: Path, export: Callable[..., Path]) -> None:
    out = export(base)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.config.requires_safety_checker is True
    assert type(pipeline.feature_extractor).__name__.startswith("CLIPImageProcessor")
    theirs = load_file(base / WEIGHTS)
    ours = pipeline.safety_checker.state_dict()
    assert theirs and all(torch.equal(value, ours[name]) for name, value in theirs.items())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=1).nsfw_content_detected == [False]
    pipeline.safety_checker.concept_embeds_weights.data.fill_(-9.0)  # it is asked
    assert pipeline("a cat", num_inference_steps=1).nsfw_content_detected == [True]


def test_other_files_are_kept_or_named(
    base: Path, export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(base)
    facts = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    assert set(facts["kept"]) == KEPT
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in KEPT)
    assert set(facts["left_out"]) == LEFT_OUT
    assert not any((out / name).exists() for name in (*LEFT_OUT, ".gitattributes"))
    card, terminal = (out / "README.md").read_text(encoding="utf-8"), capsys.readouterr().out
    for name in LEFT_OUT:
        assert name in terminal and name in card
    assert "handler.py, id_rsa, unet/diffusion_pytorch_model.bin: it may hold code" in card
    assert wrong(out, base) == []


def test_what_was_kept_is_verified(base: Path, export: Callable[..., Path]) -> None:
    out = export(base)
    weights = load_file(out / WEIGHTS)
    weights["concept_embeds"] += 1
    save_file(weights, out / WEIGHTS)
    (out / "notes.txt").unlink()
    change_index(out, requires_safety_checker=False)
    assert wrong(out, base) == [
        "notes.txt is missing",
        "model_index.json has changed",
        f"{WEIGHTS} has changed",
        "requires_safety_checker is not that of the base model",
        f"{WEIGHTS} is not that of the base model",
        "notes.txt is missing",
    ]


def test_a_copy_of_the_base_elsewhere_verifies(base: Path, export: Callable[..., Path], tmp_path: Path) -> None:
    """What was a place where the export was made is none where it is verified."""
    (base / "notes.txt").write_text(f"trained at {base}, by me", encoding="utf-8")
    (base / "scheduler/of_the_paper.json").write_text(json.dumps({"at": str(base)}), encoding="utf-8")
    out = export(base)
    assert str(base) not in (out / "notes.txt").read_text(encoding="utf-8")
    copy = base.rename(tmp_path / "copy")
    assert wrong(out, copy) == []
    (copy / "notes.txt").write_text("trained elsewhere, by me", encoding="utf-8")
    assert wrong(out, copy) == ["notes.txt is not that of the base model"]


def test_weights_of_a_variant_get_the_plain_name(base: Path, export: Callable[..., Path]) -> None:
    (base / WEIGHTS).rename(base / "safety_checker/model.fp16.safetensors")
    out = export(base)
    assert StableDiffusionPipeline.from_pretrained(out).safety_checker is not None
    assert wrong(out, base) == []


def test_of_two_variants_one_is_kept(base: Path) -> None:
    (base / "safety_checker/model.fp16.safetensors").write_bytes((base / WEIGHTS).read_bytes())
    kept = found(base)
    assert kept.files[WEIGHTS] == base / WEIGHTS
    assert kept.left_out["safety_checker/model.fp16.safetensors"] == "another variant of the same weights is copied"


def test_a_checker_that_is_a_pickle_is_left_out_and_said(
    base: Path, export: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (base / WEIGHTS).rename(base / "safety_checker/pytorch_model.bin")
    out = export(base)
    assert "not taken over from the base: safety_checker: it has no weights as safetensors" in capsys.readouterr().out
    index = json.loads((out / "model_index.json").read_text(encoding="utf-8"))
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert StableDiffusionPipeline.from_pretrained(out).safety_checker is None
    assert wrong(out, base) == []


def test_corrupt_weights_are_left_out_and_said(base: Path) -> None:
    for name in (WEIGHTS, "embeddings/toy.safetensors"):
        (base / name).write_bytes((base / name).read_bytes()[:20])
    kept = found(base)
    assert {kept.left_out[name] for name in ("safety_checker", "embeddings/toy.safetensors")} == {"it is corrupt"}
    assert kept.index["requires_safety_checker"] is False


def test_a_class_of_its_own_is_left_out(base: Path) -> None:
    change_index(base, safety_checker=["my_module", "Checker"])
    kept = found(base)
    assert set(kept.left_out) == LEFT_OUT | {"safety_checker"}
    assert not any(name.startswith("safety_checker") for name in kept.files)
    assert kept.index["requires_safety_checker"] is False


def test_links_lead_nowhere(base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x", encoding="utf-8")
    (base / "link.txt").symlink_to(secret)
    (base / "inside.txt").symlink_to(base / "notes.txt")
    (base / "dangling.txt").symlink_to(base / "nothing")
    kept = found(base)
    assert "inside.txt" in kept.files
    for name in ("link.txt", "dangling.txt"):
        assert kept.left_out[name] == "it is a link that leads out of the model"


def test_a_snapshot_in_the_hubs_cache_is_all_links(base: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "hub/models--owner--name/blobs"
    snapshot = blobs.parent / "snapshots/0123abcd"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    assert set(found(snapshot).left_out) == LEFT_OUT
    assert set(found(snapshot).files) >= KEPT


def test_a_base_that_is_an_export_loses_its_provenance_and_says_so(base: Path, tmp_path: Path) -> None:
    (base / "provenance.json").write_text("{}", encoding="utf-8")
    (base / "earlier").mkdir()
    (base / "earlier/model_index.json").write_text("{}", encoding="utf-8")
    (base / "earlier/weights.safetensors").write_text("", encoding="utf-8")
    kept = found(base)
    assert kept.left_out["provenance.json"] == "it is of the edit that made the base"
    assert kept.left_out["earlier"] == "it is a model of its own"
    assert not any(name.startswith("earlier") for name in kept.files)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_model_from_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("unet" in pattern for pattern in allow_patterns)
        if not reachable:
            raise LocalEntryNotFoundError("offline")
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    kept = kept_of(BaseModel("owner/name", "0123abcd"), [])
    assert asked == [("owner/name", "0123abcd")]
    assert ("safety_checker" in kept.index) == reachable
    assert kept.index["requires_safety_checker"] is reachable
    assert ("other files" if reachable else "all other files") in kept.left_out


def test_pictures_of_what_is_removed_do_not_come_with_an_export() -> None:
    base = BaseModel.find("emoji-sd")
    assert base.folder is not None
    assert (base.folder / "unedited.safetensors").is_file()
    kept = kept_of(base, base.names)
    assert "unedited.safetensors" not in kept.files
    assert kept.left_out["unedited.safetensors"] == "it has pictures by the model before the edit"
