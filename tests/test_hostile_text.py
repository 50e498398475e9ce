"""Concept sets and recipes made to do harm: refused in one sentence, quickly, and nothing in them is called."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_unlearn.data.concepts import MAX_BYTES, load_concept_set
from lit_unlearn.diffusion import base_model
from lit_unlearn.system.errors import UserError
from lit_unlearn.system.names import joint_name
from lit_unlearn.training import cli as training
from lit_unlearn.training.recipes import find_recipe


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that exists as soon as something hostile has run."""
    return tmp_path / "victim"


LAUGHS = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)


def refused_set(path: Path, content: bytes | str, seconds: float = 30) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        load_concept_set(path)
    assert time.process_time() - started < seconds
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    return message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('!!python/object/apply:os.system ["touch VICTIM"]', "could not determine a constructor"),
        ("concepts: !!python/object/new:subprocess.Popen [[touch, VICTIM]]", "could not determine a constructor"),
        ("concepts: !!python/name:os.system", "could not determine a constructor"),
        (LAUGHS, "aliases"),
        ("concepts: &a {dog: *a}", "not valid YAML"),
        ("a: &a {b: c}\nd:\n  <<: *a", "unknown key 'a'"),
        ("[" * 5_000, "not valid YAML"),
        ("concepts: {? {a: b} : c}", "not valid YAML"),
        ("concepts: {? [a, b] : c}", "not valid YAML"),
        ("concepts: {1: {}}", "a concept's name must be text"),
        ("a: 0x" + "f" * 10 + "\nb: 2001-99-99", "not valid YAML"),
        ("concepts: {" + ", ".join(f"c{n}: {{}}" for n in range(3000)) + "}", "3000 concepts are more than"),
        (b"\x00" * 100, "not valid YAML"),
        (b"concepts: \xff", "not valid YAML"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
    ],
    ids=range(15),
)
def test_concept_sets_that_do_harm(tmp_path: Path, victim: Path, content: bytes | str, reason: str) -> None:
    if isinstance(content, str):
        content = content.replace("VICTIM", str(victim))
    assert reason in refused_set(tmp_path / "set.yaml", content)
    assert not victim.exists()


def pets_with(pets: str, **fields: Any) -> str:
    content = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))
    content["concepts"]["dog"].update(fields)
    return yaml.safe_dump(content)


def test_concepts_too_large_to_check(pets: str, tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    assert "more than 50" in refused_set(path, pets_with(pets, names=[f"dog {n}" for n in range(51)]))
    assert "at most 1000 characters" in refused_set(path, pets_with(pets, question="x" * 1001))


@pytest.mark.parametrize("name", ["..", "../../etc", "/etc/passwd", ".hidden", "a/b", "a\\b", "~", "x" * 5000, "\n"])
def test_names_of_concepts_lead_nowhere(name: str, tmp_path: Path) -> None:
    label = joint_name([name])
    assert label not in ("", ".", "..") and "/" not in label and len(label) <= 109
    assert (tmp_path / "logs" / label).resolve().parent == (tmp_path / "logs").resolve()


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def recipe(tmp_path: Path, pets: str, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a valid recipe in which one key is replaced, into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(key: str = "", value: object = None) -> Path:
        content: dict[str, Any] = {
            "concept": "dog",
            "trainer": {"accelerator": "cpu", "logger": False},
            "model": {"class_path": "ESD", "init_args": {"model": str(tiny_sd), "concept_set": pets}},
            "data": {"class_path": "ConceptPrompts"},
        }
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        if key:
            place[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch victim"}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "victim"]}}
HUB = {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "a/b", "model": "c"}}


@pytest.mark.parametrize("value", [SYSTEM, POPEN, HUB, "os.system", "subprocess.Popen"], ids=str)
@pytest.mark.parametrize(
    "key",
    ["model", "data", "trainer.callbacks", "trainer.logger", "trainer.plugins", "model.init_args.optimizer"],
)
def test_only_classes_of_the_kind_that_belongs_there(
    recipe: Callable[..., Path], key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.prepare()
    path, called = recipe(key, value), []

    def call(*args: Any, **kwargs: Any) -> None:
        called.append((args, kwargs))
        raise AssertionError("called")

    for owner, name in ((subprocess.Popen, "__init__"), (torch.hub, "load")):
        monkeypatch.setattr(owner, name, call)
    monkeypatch.setattr(base_model, "load_parts", call)
    with pytest.raises(UserError) as caught:
        training.run(["fit", "--config", str(path)])
    assert "\n" not in str(caught.value)
    assert not called and not (tmp_path / "victim").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml"}


@pytest.mark.parametrize("method", ["../../elsewhere", "/tmp/elsewhere"])
def test_a_method_is_a_name(recipe: Callable[..., Path], method: str) -> None:
    training.prepare()
    with pytest.raises(UserError, match="leads out of the folder of the runs"):
        training.run(["fit", "--config", str(recipe("method", method))])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS, "by its aliases"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5_000, "nested too deeply"),
        ("#" * 1_000_001, "larger than"),
    ],
    ids=["laughs", "cycle", "deep", "long"],
)
def test_recipes_that_do_harm(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        find_recipe(str(path))


def test_aliases_within_reason_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\nc: *a", encoding="utf-8")
    assert find_recipe(str(path)) == path
