from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.attacks.prompt_levels import PromptLevels, level_prompts
from lit_unlearn.data.concepts import available_concept_sets, load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.system.errors import UserError

Attacked = Callable[..., AttackedModel]
LEVELS = ["name", "prefix", "variant", "short", "long"]
PREFIX = "a picture of {}"


class Whole:
    """Reads prompts to their ends."""

    def texts(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)


def test_concept_without_indirect_prompts_is_refused() -> None:
    dog = replace(load_concept_set("emoji20").get("dog"), indirect=())
    with pytest.raises(UserError, match="prompt_levels needs prompts that describe 'dog' without its name"):
        level_prompts(dog, PREFIX, Whole())  # type: ignore[arg-type]


def test_the_levels_of_the_dog() -> None:
    dog = load_concept_set("emoji20").get("dog")
    reader = BaseModel.find("emoji-sd").reader
    assert reader is not None
    found = level_prompts(dog, PREFIX, reader)
    assert list(found) == LEVELS
    assert found["name"] == ["dog"]
    assert found["prefix"] == ["a picture of dog"]
    assert found["variant"] == list(dog.direct)
    assert found["short"] == [dog.indirect[0], dog.indirect[1], dog.indirect[3]]  # of 9, 8 and 8 words; others have 13
    assert found["long"][0] == f"{dog.indirect[0]}, {dog.indirect[1]}"
    assert reader.texts(found["long"]) == found["long"]


@pytest.mark.parametrize("name", available_concept_sets())
def test_prompts_are_the_sets_own_and_none_is_an_edit_prompt(name: str) -> None:
    for concept in load_concept_set(name).concepts.values():
        found = level_prompts(concept, PREFIX, Whole())  # type: ignore[arg-type]
        assert all(found.values())
        without = ("short", "long") if len(concept.indirect) > 1 else ("short",)  # one is joined to a direct one
        assert not any(concept.find_name(prompt) for level in without for prompt in found[level])
        assert all(concept.find_name(prompt) for level in ("name", "prefix") for prompt in found[level])
        everything = {prompt for prompts in found.values() for prompt in prompts}
        assert not everything & {*concept.edit_prompts, *concept.target_prompts}


def test_prompts_that_would_be_cut_are_left_out(pets: str) -> None:
    class Short:
        def texts(self, prompts: Sequence[str]) -> list[str]:
            return [prompt[:45] for prompt in prompts]

    dog = load_concept_set(pets).get("dog")
    assert level_prompts(dog, PREFIX, Whole())["long"] == ["the pet that barks, one dog"]  # type: ignore[arg-type]
    three = replace(dog, indirect=("the pet that barks", "the best friend of man", "it wags its tail and it fetches"))
    found = level_prompts(three, PREFIX, Short())  # type: ignore[arg-type]
    assert found["long"] == ["the pet that barks, the best friend of man"]
    assert found["short"] == ["the pet that barks", "the best friend of man"]
    longer = replace(three, indirect=tuple(f"{prompt}, said everybody who saw it" for prompt in three.indirect))
    assert level_prompts(longer, PREFIX, Short())["long"] == [longer.indirect[2]]  # type: ignore[arg-type]


class Levels:
    """A judge that sees the concept in some of the pictures that it is shown at once, by the number of the call."""

    name = "levels"

    def __init__(self, shown: Sequence[int]) -> None:
        self.shown, self.calls = list(shown), 0

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        count = self.shown[self.calls % len(self.shown)]
        self.calls += 1
        return torch.tensor([float(i < count) for i in range(len(images))])


def test_the_worst_level_is_judged_on_other_pictures(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    model = attacked(judge=Levels([1, 0, 2, 4, 4, 5, 5, 5, 5, 3]))
    drawn: list[tuple[list[str], list[int], bool]] = []
    draw = model.draw
    name, edited = next(iter((n, p.clone()) for n, p in model.pretrained.parameters.items()))

    def look(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        drawn.append((list(prompts), list(seeds), torch.equal(model.pretrained.parameters[name], edited)))
        return draw(prompts, seeds)

    model.draw = look  # type: ignore[method-assign]
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = PromptLevels().run(model)
    levels: dict[str, dict[str, Any]] = found.report["levels"]
    assert {level: own["shown"] for level, own in levels.items()} == dict(
        zip(LEVELS, (0.2, 0.0, 0.4, 0.8, 0.8), strict=True)
    )
    assert [own["unedited"] for own in levels.values()] == [1.0, 1.0, 1.0, 1.0, 0.6]
    assert [is_edited for *_, is_edited in drawn] == [True] * 5 + [False] * 5
    assert found.report["level"] == "short"  # the first of equal ones
    assert found.text == "short: the pet that barks"
    assert drawn[0][0] == ["dog"] * 5
    assert not {seed for _, seeds, _ in drawn for seed in seeds} & set(model.seeds)
    found.draw(model.prompts, model.seeds)
    assert drawn[-1] == (["the pet that barks"] * 3, model.seeds, True)
    assert found.cost.unet_forwards == 5 * 5 * forwards_per_picture  # without the unedited model's


def test_the_prefix_is_a_setting(attacked: Attacked) -> None:
    found = PromptLevels(pictures=1, prefix="{} at sunset").search(attacked(judge=Levels([0, 1, 0, 0, 0])))
    assert found.text == "prefix: dog at sunset"
