from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.data.prompts import ConceptPrompts, PictureItem, Pictures, RankSampler, edited_concepts


@pytest.fixture(scope="module")
def emoji20() -> ConceptSet:
    return load_concept_set("emoji20")


@pytest.fixture(autouse=True, scope="module")
def read_once() -> Iterator[None]:
    """Reading and checking a concept set takes a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_unlearn.data.prompts.load_concept_set", cache(load_concept_set))
        yield


def trainer(rank: int = 0, world_size: int = 1, steps_done: int = 0, doing: str = "", **module: Any) -> Any:
    """What a data module asks of a trainer."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=steps_done))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        state=SimpleNamespace(fn=doing),
        lightning_module=SimpleNamespace(fit_plan=FitPlan(**module)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def prompts(rank: int = 0, world_size: int = 1, concept: str | list[str] = "dog", **arguments: Any) -> ConceptPrompts:
    data = ConceptPrompts(concept, **arguments)
    if world_size > 1:
        data.trainer = trainer(rank, world_size)
    return data


def train_batches(data: ConceptPrompts, num_pairs: int = 15) -> list[list[tuple[int, int]]]:
    """Per step the slots of the global batch and the prompt pairs in them."""
    return [[divmod(number, num_pairs) for number in batch.tolist()] for batch in data.train_dataloader()]


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


def test_a_fit_does_not_validate() -> None:
    data = prompts()
    data.trainer = trainer(doing="fit")
    assert pictures(data, "val") == []
    data.trainer = trainer(doing="validate")
    assert len(pictures(data, "val")) == 40


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
    assert sizes == [150, 150, 110]  # 20 concepts of 20 pictures, and 5 adversarial prompts of the edited one, twice


def test_adversarial_prompts_of_the_edited_concepts_come_last_with_seeds_that_do_not_depend_on_them() -> None:
    concepts = load_concept_set("emoji20")
    plain = Pictures(concepts, 2, seed=7).items
    dog, both = (Pictures(concepts, 2, 7, adversarial=edited).items for edited in (["dog"], ["dog", "apple"]))
    assert dog[: len(plain)] == plain == both[: len(plain)]
    found = dog[len(plain) :]
    assert [item.prompt for item in found[::2]] == list(concepts.get("dog").adversarial)
    assert {item.prompt_index for item in found} == set(range(10, 15))
    assert set(found) < set(both)
    assert len({item.seed for item in both}) == len(both)


def test_a_rank_takes_every_other_index_in_order() -> None:
    order = [4, 2, 0, 1, 3]
    assert [list(RankSampler(order, rank, 2)) for rank in (0, 1)] == [[4, 0, 3], [2, 1]]
    assert [len(RankSampler(order, rank, 2)) for rank in (0, 1)] == [3, 2]


# --- prompt pairs


def test_every_step_takes_all_pairs_by_default() -> None:
    batches = train_batches(prompts(steps=3))
    assert [sorted(pair for _, pair in batch) for batch in batches] == [list(range(15))] * 3
    assert batches[0] != batches[1]


def test_smaller_batches_take_the_pairs_in_turn() -> None:
    batches = train_batches(prompts(batch_size=4, steps=30))
    assert [len(batch) for batch in batches] == [4] * 30
    # 30 steps of 4 are 120 pairs: eight times all 15, each time before any comes again.
    order = [pair for batch in batches for _, pair in batch]
    assert [sorted(order[i : i + 15]) for i in range(0, 120, 15)] == [list(range(15))] * 8


def test_a_batch_larger_than_all_pairs_repeats_them() -> None:
    (batch,) = train_batches(prompts(batch_size=40, steps=1))
    assert Counter(Counter(pair for _, pair in batch).values()) == {3: 10, 2: 5}
    assert [slot for slot, _ in batch] == list(range(40))


def test_the_pairs_of_all_edited_concepts_count() -> None:
    (batch,) = train_batches(prompts(concept=["dog", "cat"], steps=1), num_pairs=30)
    assert sorted(pair for _, pair in batch) == list(range(30))


def test_the_method_says_how_many_pairs_there_are() -> None:
    data = prompts(batch_size=4, steps=2)
    data.trainer = trainer(num_pairs=2)
    assert [sorted(pair for _, pair in batch) for batch in train_batches(data, num_pairs=2)] == [[0, 0, 1, 1]] * 2


def test_the_order_is_by_the_seed_of_the_method_not_of_the_pictures() -> None:
    first = train_batches(prompts(batch_size=4))
    assert train_batches(prompts(batch_size=4)) == first
    assert train_batches(prompts(batch_size=4, seed=1)) == first
    data = prompts(batch_size=4)
    data.trainer = trainer(seed=1)
    assert train_batches(data) != first


@pytest.mark.parametrize("batch_size", [4, 5, 20, None])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_steps_of_several_ranks_are_those_of_one(batch_size: int | None, world_size: int) -> None:
    alone = train_batches(prompts(batch_size=batch_size))
    shares = [train_batches(prompts(rank, world_size, batch_size=batch_size)) for rank in range(world_size)]
    assert [sorted(chain(*parts)) for parts in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]
    for batch in alone:
        assert len(set(batch)) == len(batch)  # a slot tells repetitions of a pair apart


def test_a_resumed_epoch_goes_on_behind_the_steps_that_it_had() -> None:
    data = prompts(batch_size=4, steps=5)
    whole = train_batches(data)
    for done, rest in ((0, whole), (2, whole[2:]), (5, whole)):
        data.trainer = trainer(steps_done=done)
        assert train_batches(data) == rest
        assert len(data.train_dataloader()) == 5  # what Lightning counts on


def test_every_rank_needs_a_pair() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=2 is less than the 3 processes"):
        prompts(0, 3, batch_size=2).train_dataloader()


# --- wrong values


@pytest.mark.parametrize("field", ["batch_size", "steps", "images_per_prompt", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}={value} must be at least 1"):
        ConceptPrompts("dog", **{field: value})


@pytest.mark.parametrize("text", ["dog,cat", "dog, cat", "dog;cat", "dog\uff0ccat"])
def test_several_concepts_in_one_text_are_refused_with_how_a_list_is_written(text: str, emoji20: ConceptSet) -> None:
    with pytest.raises(
        ValueError, match=r"closest names: .*; several concepts are written --concept '\[dog, cat\]'\.$"
    ):
        edited_concepts(text, emoji20)
    with pytest.raises(ValueError, match=r"has no concept 'dgo'; closest names: dog, owl\.$|closest names: dog\.$"):
        edited_concepts("dgo", emoji20)


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


def test_the_method_says_how_long_an_epoch_is() -> None:
    data = prompts(batch_size=4, steps=5)
    data.trainer = trainer(steps=1)
    assert len(train_batches(data)) == 1
    data.trainer = trainer()
    assert len(train_batches(data)) == 5
