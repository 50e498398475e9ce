"""What the first maps on text read: every prompt once, and no position behind the last one that is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.shared import text_maps
from lit_unlearn.methods.shared.text_maps import retained_inputs, subject_places, text_keys

NAMES, GUIDES = ["dog", "soccer ball", "dog", "the dog at sunset"], ["", "cat", "", "dog"]


def shapes(pipeline: Pipeline) -> list[tuple[int, ...]]:
    """Sizes of the ``input_ids`` that the first text encoder reads from now on."""
    read: list[tuple[int, ...]] = []

    def note(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        read.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    pipeline.texts[0].model.register_forward_pre_hook(note, with_kwargs=True)
    return read


def whole(pipeline: Pipeline, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        return pipeline.first_inputs(pipeline.encode(prompts))["tokens"].float()


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
def test_of_a_causal_encoder_only_what_is_read_is_encoded_and_once(family: str, request: pytest.FixtureRequest) -> None:
    pipeline = load_pipeline(str(request.getfixturevalue(family)))
    states = whole(pipeline, NAMES), whole(pipeline, GUIDES)
    read = shapes(pipeline)
    found = text_keys(pipeline, NAMES, GUIDES, ways=["tokens"], which="last_subject")
    # Five texts: dog, soccer ball, the longer one, the empty one, cat; its last of four words is the fifth token.
    assert read == [(5, 5)]
    for keys, wanted in zip(found, states, strict=True):
        rows, places, _ = subject_places(pipeline, keys["tokens"], [], "last_subject")
        largest = max(1.0, float(wanted.abs().max()))  # states before the final norm are larger
        assert_close(keys["tokens"].at(rows, places), wanted[rows, places], rtol=0, atol=3e-6 * largest)
    assert torch.equal(found[0]["tokens"].at(*_first(0)), found[0]["tokens"].at(*_first(2)))


def _first(row: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([row]), torch.tensor([1])


def test_prompts_of_like_length_are_cut_together(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(str(tiny_sd))
    states, read = whole(pipeline, NAMES), shapes(pipeline)
    monkeypatch.setattr(text_maps, "ENCODE_BATCH", 2)
    (found,) = text_keys(pipeline, NAMES, ways=["tokens"], which="last_subject")
    assert read == [(2, 3), (1, 5)]
    keys = found["tokens"]
    rows, places, _ = subject_places(pipeline, keys, [], "last_subject")
    assert_close(keys.at(rows, places), states[rows, places], rtol=0, atol=3e-6)
    assert keys.at(*_first(0)).isfinite().all()
    assert keys.at(torch.tensor([0]), torch.tensor([4])).isnan().all()  # not encoded, so it cannot be used unnoticed


def test_retained_prompts_are_sorted_by_length_over_batches_and_their_keys_keep_their_order(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(tiny_sd))
    prompts = ["cat", "a dog in the rain", "dog", "the cat in the rain"]
    states, read = whole(pipeline, prompts), shapes(pipeline)
    monkeypatch.setattr(text_maps, "ENCODE_BATCH", 2)
    kept = retained_inputs(pipeline, ["tokens"], prompts, last_subject=True)["tokens"]
    assert read == [(2, 2), (2, 6)]
    keys = torch.stack([states[row, last] for row, last in enumerate([1, 5, 1, 5])])
    assert kept.keys is not None
    assert_close(kept.keys, keys.double(), rtol=0, atol=3e-6)
    assert_close(kept.moment, kept.keys.mT @ kept.keys)


@pytest.mark.parametrize(
    ("family", "ways", "which"),
    [
        ("tiny_sd", ["tokens"], "from_subject"),
        ("tiny_sd", ["tokens"], "all"),
        ("tiny_sdxl", ["tokens", "pooled"], "last_subject"),  # pooled at the end of the text
        ("tiny_sd3", ["tokens"], "last_subject"),  # a T5 reads both directions
    ],
)
def test_the_whole_window_is_read_where_it_is_needed(
    family: str, ways: list[str], which: str, request: pytest.FixtureRequest
) -> None:
    pipeline = load_pipeline(str(request.getfixturevalue(family)))
    states, read = whole(pipeline, NAMES), shapes(pipeline)
    (found,) = text_keys(pipeline, NAMES, ways=ways, which=which)  # type: ignore[arg-type]
    assert read == [(3, pipeline.texts[0].length)]
    assert set(found) == set(ways)
    assert_close(found["tokens"].read(), states.flatten(0, 1), rtol=0, atol=1e-5)


def test_retained_prompts_count_as_often_as_they_are_listed(tiny_sd: Path) -> None:
    pipeline = load_pipeline(str(tiny_sd))
    states, read = whole(pipeline, ["cat", "dog", "cat", ""]), shapes(pipeline)
    kept = retained_inputs(pipeline, ["tokens"], ["cat", "dog", "cat"], empty_weight=2)["tokens"]
    assert read == [(2, 32), (1, 32)]
    rows = torch.cat([states, states[-1:]]).flatten(0, 1).double()
    assert (kept.count, kept.prompts, kept.keys) == (5 * 32, 4, None)
    assert_close(kept.moment, rows.mT @ rows, rtol=0, atol=1e-4)
    assert retained_inputs(pipeline, ["tokens"], [])["tokens"].moment is None


@pytest.mark.parametrize("way", ["tokens", "projected"])
def test_padding_that_nothing_reads_is_neither_edited_nor_retained(way: str, tiny_pixart: Path) -> None:
    pipeline = load_pipeline(str(tiny_pixart))
    prompts, guides = ["dog", "the dog at sunset", ""], ["soccer ball", "the cat at sunset", ""]
    tokens = [len(ids) for ids in pipeline.texts[0].tokenizer(prompts).input_ids]  # with the end of the text
    assert 1 == tokens[2] < tokens[0] < tokens[1] < 20
    states = [pipeline.first_inputs(pipeline.encode([prompt]).detach())[way][0].detach() for prompt in prompts]
    rows = torch.cat([own[:count] for own, count in zip(states, tokens, strict=True)])
    found, others = text_keys(pipeline, prompts, guides, ways=[way])
    assert_close(found[way].read(), rows, rtol=0, atol=1e-5)
    edited, places, (goals,) = subject_places(pipeline, found[way], [others[way]], "all")
    assert edited.bincount().tolist() == tokens
    assert places.tolist() == [place for count in tokens for place in range(count)]
    assert others[way].mask is not None and others[way].mask[edited, goals].all()
    kept = retained_inputs(pipeline, [way], prompts[:2], empty_weight=3)[way]
    assert kept.count == tokens[0] + tokens[1] + 3
    weights = torch.tensor([*[1.0] * (len(rows) - 1), 3.0], dtype=torch.float64).unsqueeze(1)
    assert_close(kept.moment, rows.double().mT @ (weights * rows.double()), rtol=0, atol=1e-4)


def test_no_goal_is_padding_that_nothing_reads(tiny_pixart: Path) -> None:
    pipeline = load_pipeline(str(tiny_pixart))
    edited, guides = text_keys(pipeline, ["dog", "dog"], ["", "the cat at sunset"], ways=["tokens"])
    rows, places, (goals,) = subject_places(pipeline, edited["tokens"], [guides["tokens"]], "from_subject")
    dog, cat = (len(ids) for ids in pipeline.texts[0].tokenizer(["dog", "the cat at sunset"]).input_ids)
    assert rows.tolist() == [0, 0, 1, 1]
    assert places.tolist() == [dog - 2, dog - 1] * 2  # the last token of the name, and the end of the text
    assert goals.tolist() == [0, 0, cat - 2, cat - 1]  # of the empty prompt its end, which is all that is read
