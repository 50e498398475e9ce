from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.attacks.probing import (
    drawn_in_batches,
    kept,
    reference_rows,
    target_prompts,
    unrelated_prompts,
)
from lit_unlearn.data.concepts import load_concept_set

Attacked = Callable[..., AttackedModel]


def test_the_target_stands_where_the_name_was() -> None:
    dog = load_concept_set("emoji20").get("dog")
    prompts = ["look at a dog face", "the pet that barks"]
    assert target_prompts(dog, prompts) == ["look at a cat face", "cat"]


def test_unrelated_prompts_are_of_others_and_name_no_edited_concept() -> None:
    concept_set = load_concept_set("emoji20")
    sketch, rain = concept_set.get("sketch"), concept_set.get("rain")
    prompts = unrelated_prompts(concept_set, [sketch, rain])
    others = [concept for concept in concept_set.concepts.values() if concept not in (sketch, rain)]
    assert set(prompts) < {prompt for concept in others for prompt in concept.direct}
    assert not any(concept.find_name(prompt) for concept in (sketch, rain) for prompt in prompts)
    assert any(sketch.find_name(prompt) for concept in others for prompt in concept.direct)  # such are left out
    assert prompts[0] == others[0].direct[0]
    owners = [concept.name for prompt in prompts[:10] for concept in others if prompt in concept.direct]
    assert len(set(owners)) == 10  # one of each before the second of any


def test_pictures_are_drawn_in_batches_with_their_numbers() -> None:
    parts: list[tuple[list[str], list[int], range]] = []

    def part(prompts: list[str], seeds: list[int], numbers: range) -> Tensor:
        parts.append((prompts, seeds, numbers))
        assert not torch.is_grad_enabled()
        return torch.tensor(seeds).view(-1, 1, 1, 1)

    drawn = drawn_in_batches(part)([f"p{i}" for i in range(13)], list(range(100, 113)))
    assert drawn.flatten().tolist() == list(range(100, 113))
    assert [numbers for *_, numbers in parts] == [range(10), range(10, 13)]
    assert parts[1][:2] == (["p10", "p11", "p12"], [110, 111, 112])


def test_kept_pictures_are_drawn_once() -> None:
    calls: list[list[str]] = []

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        calls.append(list(prompts))
        return torch.tensor(seeds)

    again = kept(draw, ["a", "b"], [1, 2])
    assert calls == [["a", "b"]]
    assert again(("a", "b"), (1, 2)).tolist() == [1, 2]
    assert calls == [["a", "b"]]
    assert again(["a", "b"], [1, 3]).tolist() == [1, 3]
    assert len(calls) == 2


@pytest.mark.parametrize(("pictures", "prompts"), [(10, 5), (4, 6), (7, 3), (1, 5)])
def test_every_pair_of_picture_and_prompt_occurs_before_one_recurs(
    pictures: int, prompts: int, attacked: Attacked
) -> None:
    model = attacked()
    model.concept = replace(model.concept, direct=tuple(f"one dog {i}" for i in range(prompts)))
    model.__dict__["references"] = type("References", (), {"latents": torch.zeros(pictures, 1)})
    rows = reference_rows(model, range(pictures * prompts))
    pairs = {(row, number % prompts) for number, row in enumerate(rows)}
    assert len(pairs) == pictures * prompts
    assert rows[: min(pictures, prompts)] == list(range(min(pictures, prompts)))
