"""Sets whose prompts the text encoder of ``tiny_sd``, of 32 positions, does not read to their end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import load_copy
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.cut_prompts import check_cuts
from lit_unlearn.diffusion import prompts as prompts_module
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system.errors import UserError

BEFORE = " ".join(["sunset"] * 28)
"""Behind it there is room for two tokens."""


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "_WARNED_OF", set())


@pytest.fixture
def pets_with(pets: str, tmp_path: Path) -> Callable[..., str]:
    """Writes the set ``pets`` with other prompts of the dog, or of another concept."""

    def build(concept: str = "dog", **prompts: list[str]) -> str:
        content = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))
        content["concepts"][concept].update(prompts)
        path = tmp_path / "pets.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return build


def check(path: str, model: Path, concept: str = "dog") -> None:
    reader, concepts = BaseModel.find(str(model)).reader, load_concept_set(path)
    assert reader is not None
    check_cuts(reader, concepts, [concepts.get(concept)])


def test_prompts_that_fit_are_not_spoken_of(tiny_sd: Path, pets: str, pets_with: Callable[..., str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(pets, tiny_sd)
        check(pets_with(direct=[f"{BEFORE} a dog"]), tiny_sd)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (
            {"edit_prompts": ["a dog", f"{BEFORE} with a dog"], "target_prompts": ["a ball", f"{BEFORE} with a ball"]},
            rf"dog: edit_prompts: the name of the concept in '{BEFORE} with a dog' lies behind .* else: short",
        ),
        (
            {"edit_prompts": [f"{BEFORE} it barks", "a dog"], "target_prompts": [f"{BEFORE} it sings", "a ball"]},
            None,
        ),
        (
            {"edit_prompts": [f"{BEFORE} the one which barks", "a dog"],
             "target_prompts": [f"{BEFORE} the one which sings", "a ball"]},
            rf"reads '{BEFORE} the one which barks' and its target prompt '.* sings' as the same 30 tokens",
        ),
        ({"direct": [f"{BEFORE} and a dog"]}, rf"dog: direct: the name .* '{BEFORE} and a dog' .* measures nothing"),
        ({"direct": [f"{BEFORE} a dog and a dog"]}, None),
        ({"indirect": [f"{BEFORE} it barks at all"]}, None),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The prompt '.*ignores the rest")
def test_prompts_that_mean_nothing_are_refused(
    prompts: dict[str, list[str]], sentence: str | None, tiny_sd: Path, pets_with: Callable[..., str]
) -> None:
    path = pets_with(**prompts)
    if sentence is None:
        check(path, tiny_sd)
        return
    with pytest.raises(ValueError, match=sentence) as raised:
        check(path, tiny_sd)
    assert str(raised.value).startswith(f"{path}: dog: ")


@pytest.mark.filterwarnings("ignore:The prompt '.*ignores the rest")
def test_what_is_not_edited_is_still_evaluated(tiny_sd: Path, pets_with: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"cat: direct: the name of the concept .* measures nothing"):
        check(pets_with("cat", direct=[f"{BEFORE} with a cat"]), tiny_sd)
    pair = f"{BEFORE} or with a cat", f"{BEFORE} or with a dog"
    lost = {"edit_prompts": ["a cat", pair[0]], "target_prompts": ["a dog", pair[1]]}
    check(pets_with("cat", **lost), tiny_sd)
    with pytest.raises(ValueError, match="cat: edit_prompts: the name of the concept"):
        check(pets_with("cat", **lost), tiny_sd, "cat")


def test_every_other_cut_is_warned_of_once(tiny_sd: Path, pets_with: Callable[..., str]) -> None:
    direct, edit, target = (f"{BEFORE} a {text} on and on" for text in ("dog one", "dog two", "ball three"))
    indirect, adversarial = f"{BEFORE} it barks on and on", f"{BEFORE} b a r k"
    path = pets_with(
        direct=[direct],
        indirect=[indirect],
        adversarial=[adversarial],
        edit_prompts=["a dog", edit],
        target_prompts=["a ball", target],
    )
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            check(path, tiny_sd)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 5
    for prompt in (direct, indirect, adversarial, edit, target):
        assert sum(f"{prompt}' has " in text and "ignores the rest" in text for text in texts) == 1


@pytest.mark.parametrize("kind", [ValueRefinement, UCE, ESD])
def test_methods_refuse_before_weights_are_read(
    kind: type[ConceptEditor], tiny_sd: Path, pets_with: Callable[..., str]
) -> None:
    read: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="direct: the name of the concept"):
        patch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *given: read.append(given))
        kind(concept="dog", model=str(tiny_sd), concept_set=pets_with(direct=[f"{BEFORE} with a dog"]))
    assert read == []


def test_a_model_from_the_hub_refuses_when_its_tokens_are_known(
    tiny_sd: Path, pets_with: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *given: load_copy(tiny_sd))
    module = ValueRefinement(concept="dog", model="owner/name", concept_set=pets_with(direct=[f"{BEFORE} with a dog"]))
    with pytest.raises(UserError, match="direct: the name of the concept"):
        module.configure_model()
