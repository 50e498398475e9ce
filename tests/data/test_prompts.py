from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.data.prompts import ConceptPrompts, PictureItem, Pictures, RankSampler, edited_concepts


@pytest.fixture(scope="module")
def emoji20() -> ConceptSet:
    return load_concept_set("emoji20")


def prompts(rank: int = 0, world_size: int = 1, concept: str | list[str] = "dog", **arguments: Any) -> ConceptPrompts:
    data = ConceptPrompts(concept, **arguments)
    if world_size > 1:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    return data


def train_batches(data: ConceptPrompts) -> list[list[int]]:
    return [batch.tolist() for batch in data.train_dataloader()]


def pictures(data: ConceptPrompts, split: str = "test") -> list[PictureItem]:
    return [item for batch in getattr(data, f"{split}_dataloader")() for item in batch]


# --- pictures


def test_every_prompt_of_every_concept_is_a_picture(emoji20: ConceptSet) -> None:
    items = Pictures(emoji20, images_per_prompt=2, seed=0).items
    expected = [
        (prompt, concept.question)
        for concept in emoji20.concepts.values()
        for prompt in concept.prompts
        for _ in range(2)
    ]
    assert [(item.prompt, item.question) for item in items] == expected
    names = list(emoji20.concepts)
    for item in items:
        concept = emoji20.get(names[item.concept_index])
        assert concept.prompts[item.prompt_index] == item.prompt
    assert Counter(item.image_index for item in items) == {0: 200, 1: 200}


def test_no_two_pictures_share_a_seed(emoji20: ConceptSet) -> None:
    seeds = [item.seed for item in Pictures(emoji20, images_per_prompt=4, seed=7).items]
    assert len(set(seeds)) == len(seeds) == 800


def test_a_picture_keeps_its_seed_however_many_there_are(emoji20: ConceptSet) -> None:
    def seeds(**arguments: Any) -> dict[tuple[str, int], int]:
        return {(item.prompt, item.image_index): item.seed for item in Pictures(emoji20, seed=3, **arguments).items}

    many = seeds(images_per_prompt=3)
    for few in (seeds(images_per_prompt=1), seeds(images_per_prompt=2, prompts_per_kind=1)):
        assert few.items() <= many.items()
    other = {(item.prompt, item.image_index): item.seed for item in Pictures(emoji20, 3, seed=4).items}
    assert all(other[key] == seed + 1 for key, seed in many.items())


def test_validation_sees_one_direct_and_one_indirect_prompt_of_each_concept(emoji20: ConceptSet) -> None:
    expected = [p for concept in emoji20.concepts.values() for p in (concept.direct[0], concept.indirect[0])]
    items = pictures(prompts(), "val")
    assert [item.prompt for item in items] == expected
    assert {item.prompt_index for item in items} == {0, 5}
    assert set(items) <= set(pictures(prompts()))


def test_predict_makes_the_pictures_of_test() -> None:
    assert pictures(prompts(), "predict") == pictures(prompts())


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("split", ["val", "test"])
def test_ranks_share_the_pictures_without_repeating_any(split: str, world_size: int) -> None:
    alone = pictures(prompts(), split)
    shares = [pictures(prompts(rank, world_size), split) for rank in range(world_size)]
    together = [item for share in shares for item in share]
    assert len(together) == len(set(together)) == len(alone)
    assert set(together) == set(alone)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_of_pictures_have_the_size_asked_for() -> None:
    sizes = [len(batch) for batch in prompts(eval_batch_size=150).test_dataloader()]
    assert sizes == [150, 150, 100]


def test_a_rank_takes_every_other_index_in_order() -> None:
    order = [4, 2, 0, 1, 3]
    assert [list(RankSampler(order, rank, 2)) for rank in (0, 1)] == [[4, 0, 3], [2, 1]]
    assert [len(RankSampler(order, rank, 2)) for rank in (0, 1)] == [3, 2]


# --- prompt pairs


def test_every_step_takes_all_pairs_by_default() -> None:
    batches = train_batches(prompts(steps=3))
    assert [sorted(batch) for batch in batches] == [list(range(15))] * 3
    assert batches[0] != batches[1]


def test_smaller_batches_take_the_pairs_in_turn() -> None:
    batches = train_batches(prompts(batch_size=4, steps=30))
    assert [len(batch) for batch in batches] == [4] * 30
    # 30 steps of 4 are 120 pairs: eight times all 15, each time before any comes again.
    order = [index for batch in batches for index in batch]
    assert [sorted(order[i : i + 15]) for i in range(0, 120, 15)] == [list(range(15))] * 8


def test_a_batch_is_at_most_all_pairs_of_all_edited_concepts() -> None:
    assert prompts(batch_size=100).batch_size == 15
    assert prompts(concept=["dog", "cat"]).batch_size == 30
    assert sorted(train_batches(prompts(concept=["dog", "cat"], steps=1))[0]) == list(range(30))


def test_the_order_is_the_seeds() -> None:
    first = train_batches(prompts(batch_size=4))
    assert train_batches(prompts(batch_size=4)) == first
    assert train_batches(prompts(batch_size=4, seed=1)) != first


@pytest.mark.parametrize("batch_size", [4, 5, None])
def test_the_steps_of_several_ranks_are_those_of_one(batch_size: int | None) -> None:
    alone = train_batches(prompts(batch_size=batch_size))
    shares = [train_batches(prompts(rank, 2, batch_size=batch_size)) for rank in range(2)]
    for step, batch in enumerate(alone):
        first, second = shares[0][step], shares[1][step]
        assert not set(first) & set(second)
        assert sorted(first + second) == sorted(batch)


def test_every_rank_needs_a_pair() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=2 is less than the 3 processes"):
        prompts(0, 3, batch_size=2).train_dataloader()


# --- wrong values


@pytest.mark.parametrize("field", ["batch_size", "steps", "images_per_prompt", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}={value} must be at least 1"):
        ConceptPrompts("dog", **{field: value})


def test_edited_concepts_are_checked(emoji20: ConceptSet) -> None:
    assert [concept.name for concept in edited_concepts("dog", emoji20)] == ["dog"]
    assert [concept.name for concept in edited_concepts(["owl", "dog"], emoji20)] == ["owl", "dog"]
    with pytest.raises(ValueError, match="names a concept twice"):
        edited_concepts(["dog", "cat", "dog"], emoji20)
    with pytest.raises(ValueError, match="edits nothing"):
        edited_concepts([], emoji20)
    with pytest.raises(ValueError, match="dog"):
        edited_concepts("dogg", emoji20)


def test_an_unknown_concept_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        ConceptPrompts("dog", str(tmp_path / "none.yaml"))
