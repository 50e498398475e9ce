"""An export names what it was made of, and nothing in it says where that lies on its maker's machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import edit_content, files, metadata
from lit_unlearn import cli
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.public_name import hub_snapshot, public_name
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.edits.public import Places, is_place, public_content
from lit_unlearn.edits.verify import verify_export

SECRET = "secret-user"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder whose name must not get about; commands run below it."""
    home = tmp_path / SECRET
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home


def ckpt_of(model: str, place: Path, path: Path, **facts: Any) -> Path:
    """Write a checkpoint of an edit of ``model``, which lies at ``place``, that names paths wherever one can stand."""
    private = str(place.parent)
    arguments = {"model": model, "revision": None, "judge": f"{private}/a judge", "num": 3}
    recipe = {
        "model": {"class_path": "ValueRefinement", "init_args": {**arguments, "judge_cache": "logs/judged"}},
        "trainer": {"default_root_dir": f"{private}/runs", "logger": {"save_dir": f"~/{SECRET}/logs"}},
        "data": {
            "init_args": {"folder": f"../{SECRET}/pictures", "note": f"see {private}/notes, or /etc/{SECRET}/folder"}
        },
        "windows": rf"C:\Users\{SECRET}\base",
    }
    pets = {"name": "pets", "concepts": {"dog": {"direct": ["a dog / a cat", "and/or a dog"]}}}
    facts = {"model": model, "recipe": recipe, "concept_set": pets, **facts}
    torch.save(edit_content(place, lambda value: value + 0.5, arguments=arguments, **facts), path)
    return path


def everything(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


FORMS = {"folder": [], "2022": ["--names", "2022"], "delta": ["--delta"], "lora": ["--lora", "auto"]}


@pytest.fixture(params=["absolute", "relative", "home", "link", "cache"])
def given(request: pytest.FixtureRequest, home: Path, tiny_sd: Path) -> tuple[str, str]:
    """A base model as it was named, and what it may be called."""
    private = home / "work/private"
    kind = request.param
    place = private / f"models--owner--name/snapshots/{COMMIT}" if kind == "cache" else private / "base"
    shutil.copytree(tiny_sd, place)
    (place / "notes.txt").write_text(f"trained at {place} by {home}\n", encoding="utf-8")
    for config in ("unet/config.json", "text_encoder/config.json"):
        content = json.loads((place / config).read_text(encoding="utf-8"))
        (place / config).write_text(json.dumps({**content, "_name_or_path": str(place)}), encoding="utf-8")
    (place / "extra").mkdir()
    save_file({"<toy>": torch.ones(1, 32)}, place / "extra/toy.safetensors", {"made by": f"{home}/train.py"})
    (place / "extra/config.json").write_text(json.dumps({"_name_or_path": f"{home}/x"}), encoding="utf-8")
    if kind == "link":
        (home / "link").symlink_to(place)
    names = {"absolute": str(place), "relative": "private/base", "link": str(home / "link"), "cache": str(place)}
    name = names.get(kind, os.path.relpath(place))
    return name, {"link": "link@", "cache": "owner/name"}.get(kind, "base@")


@pytest.mark.parametrize("form", FORMS)
def test_nothing_says_where_it_was_made(given: tuple[str, str], form: str, home: Path) -> None:
    model, name = given
    ckpt_path = ckpt_of(model, Path(model).resolve(), home / "work/edit.ckpt")
    assert cli.main(["export", "--ckpt_path", str(ckpt_path), "-o", "out", *FORMS[form]]) == 0
    written = everything(Path("out"))
    assert written
    for file, content in written.items():
        for secret in (SECRET.encode(), b"private"):
            assert secret not in content, (file, content[max(0, content.find(secret) - 80) :][:160])
    if form in ("folder", "2022"):
        facts = json.loads(written["provenance.json"])
        assert f"# out: {facts['base_model']} without dog" in written["README.md"].decode()
        assert ("base_model: owner/name" in written["README.md"].decode()) == (name == "owner/name")
        assert written["notes.txt"].decode() == f"trained at {facts['base_model']} by ~\n"
    else:
        (file,) = written
        facts = {k: json.loads(v) for k, v in metadata(f"out/{file}").items() if k != "format"}
    assert facts["base_model"].startswith(name)
    assert facts["config"]["model"] == facts["recipe"]["model"]["init_args"]["model"] == facts["base_model"]
    assert facts["config"]["judge"] == "a judge"
    assert facts["recipe"]["model"]["init_args"]["judge_cache"] == "logs/judged"
    assert facts["recipe"]["data"]["init_args"] == {"folder": "pictures", "note": "see notes, or folder"}
    assert facts["recipe"]["windows"] == "base"
    assert facts["concept_set"]["concepts"]["dog"]["direct"] == ["a dog / a cat", "and/or a dog"]
    assert "recipe.trainer.default_root_dir" in facts["local_paths"] and "config.judge" in facts["local_paths"]
    if name == "owner/name":
        assert facts["base_revision"] == facts["base_commit"] == facts["config"]["revision"] == COMMIT
    base = BaseModel.find(model)
    assert [line for finding in verify_export(Path("out"), base) for line in finding.wrong] == []


def test_a_delta_of_a_folder_asks_for_it(home: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt_path = ckpt_of(str(tiny_sd), tiny_sd, home / "edit.ckpt")
    assert cli.main(["export", "--ckpt_path", str(ckpt_path), "-o", "d.safetensors", "--delta"]) == 0
    draw = ["generate", "a dog", "-o", "a.png", "--ckpt_path", "d.safetensors", "--num_inference_steps", "1"]
    assert cli.main(draw) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"lit-unlearn: error: d.safetensors edits a model in a folder called {tiny_sd.name!r} and does not say where "
        "that lies: name it with --model."
    )
    assert cli.main([*draw, "--model", str(tiny_sd)]) == 0


def test_a_delta_of_the_embedded_model_needs_no_name(home: Path) -> None:
    edit = BaseModel.find("emoji-sd")
    ckpt_path = ckpt_of(str(edit.place), Path(edit.place), home / "edit.ckpt")
    assert cli.main(["export", "--ckpt_path", str(ckpt_path), "-o", "d.safetensors", "--delta"]) == 0
    assert read_edit("d.safetensors").model == "emoji-sd"


def test_an_edit_of_a_snapshot_fits_the_hub_id(home: Path, tiny_sd: Path) -> None:
    place = home / f"hub/models--owner--name/snapshots/{COMMIT}"
    shutil.copytree(tiny_sd, place)
    edit = read_edit(ckpt_of(str(place), place, home / "edit.ckpt"))
    edit.check_base(BaseModel("owner/name", None))
    with pytest.raises(ValueError, match="does not fit model='owner/other'"):
        edit.check_base(BaseModel("owner/other", None))


def test_a_word_that_is_also_the_models_name_stays(home: Path, tiny_sd: Path) -> None:
    """A base model in a folder ``dog`` of this folder does not rename the concept."""
    shutil.copytree(tiny_sd, "dog")
    ckpt_path = ckpt_of("dog", Path("dog").resolve(), home / "edit.ckpt", edit={"class_path": "dog"})
    assert cli.main(["export", "--ckpt_path", str(ckpt_path), "-o", "d.safetensors", "--delta"]) == 0
    facts = {k: json.loads(v) for k, v in metadata("d.safetensors").items() if k != "format"}
    assert facts["edit"] == {"class_path": "dog"}
    assert facts["config"]["model"] == facts["base_model"] != "dog"


def test_public_names(tiny_sd: Path, tiny_sd2: Path, tmp_path: Path) -> None:
    def name(model: str) -> tuple[str, str | None]:
        base = BaseModel.find(model)
        return public_name(base, base.sha256(torch.float32))

    copy = shutil.copytree(tiny_sd, tmp_path / tiny_sd.name)
    assert name(str(copy)) == name(str(tiny_sd)) != name(str(tiny_sd2))  # of the weights, wherever they lie
    assert name("emoji-sd") == ("emoji-sd", None)
    assert public_name(BaseModel("owner/name", "main"), {}) == ("owner/name", "main")
    assert hub_snapshot(f"/x/models--a--b/snapshots/{COMMIT}/") == ("a/b", COMMIT)
    assert hub_snapshot(f"C:\\x\\models--a--b\\snapshots\\{COMMIT}") == ("a/b", COMMIT)
    assert hub_snapshot(f"/x/models--a--b/snapshots/{COMMIT}/sub") is None


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/someone/base", "base"),
        ("clip /data/someone/clip emoji20", "clip clip emoji20"),
        ("~/x/y", "y"),
        ("../x/y", "y"),
        (r"\\server\share\x", "x"),
        (r"D:\My models\x", "x"),
        ("file:///secret/home/models/x", "file://x"),
        ("my judge in /secret/home", "my judge in ~"),
        *((text, text) for text in ("owner/name", "a dog / a cat", "AC/DC", "/imagine a dog", "https://a.b/c/d")),
        *(
            (text, text)
            for text in ("logs/judged", "lit_unlearn.core.null_space_solver.NullSpace", "", ".", "1/2", "w/o a dog")
        ),
    ],
)
def test_what_is_a_place(text: str, public: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/secret/home")
    assert Places({}).text(text) == public


def test_a_place_with_spaces_is_found_within_other_texts_once_it_is_known() -> None:
    places, changed = Places({}), list[str]()
    facts = {"judge": "/home/some one/clip", "scores": {"judge": "clip /home/some one/clip emoji20"}}
    places.learn(facts)
    assert places.without(facts, changed) == {"judge": "clip", "scores": {"judge": "clip clip emoji20"}}
    assert changed == ["judge", "scores.judge"]


def test_relative_paths_are_places_where_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_place("mine/set.yaml")
    Path("mine").mkdir()
    Path("mine/set.yaml").touch()
    assert is_place("mine/set.yaml")


@pytest.mark.parametrize(
    ("name", "content", "public"),
    [
        ("tokenizer/vocab.json", b'{"/a/b": 1, "x": "/a/b"}', None),  # words
        ("tokenizer/merges.txt", b"/a/b c", None),
        ("a.png", b"/a/b", None),
        ("LICENSE", b"see /a/b/c", b"see c"),
        ("notes.txt", b"in /a/b/c or /d/e/f", b"in c or /d/e/f"),  # any path could be of the licence
        ("notes.txt", b"nothing", None),
        ("x.json", b'{"at": "/u/v/w"}', b'{\n  "at": "w"\n}'),
        ("x.json", b'{"at" :1}', None),
        ("x.json", b"at /a/b/c, which is not JSON", b"at c, which is not JSON"),
        ("x.json", b"[" * 100_000, None),
        ("x.txt", b"\xff /a/b", None),
    ],
)
def test_contents(
    name: str, content: bytes, public: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/a/b")
    path = tmp_path / Path(name).name
    path.write_bytes(content)
    assert public_content(path, name, Places({})) == public


def test_the_header_of_a_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training scripts put paths there, as kohya's do."""
    monkeypatch.setenv("HOME", "/a/b")
    tensors = {"x": torch.arange(5.0), "y": torch.arange(3)}
    path = tmp_path / "toy.safetensors"
    save_file(tensors, path, {"ss_sd_model_name": "/a/b/model", "format": "pt"})
    public = public_content(path, path.name, Places({}))
    assert public is not None
    path.write_bytes(public)
    assert metadata(str(path)) == {"ss_sd_model_name": "model", "format": "pt"}
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())
    assert public_content(path, path.name, Places({})) is None
