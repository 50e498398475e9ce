from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import load_copy
from lit_unlearn.attacks.base import NUM_REFERENCES, REFERENCE_SEED, AttackedModel, denoising_errors
from lit_unlearn.attacks.relearning import NUM_OTHERS, Relearning, denoiser_parameters, draw_others, trained
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.judges.emoji import EmojiJudge

Attacked = Callable[..., AttackedModel]


class After:
    """A judge that sees the concept only from its ``rounds``-th round of questions on."""

    name = "after"

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        if len(images) == NUM_REFERENCES:  # of the pictures to learn from
            return torch.ones(len(images))
        self.rounds -= 1
        return torch.full((len(images),), float(self.rounds < 0))


def test_the_weights_are_those_of_before(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    model = attacked(judge=After(rounds=2))
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        before = model.draw(model.prompts, model.seeds)
        found = Relearning(steps=5, learning_rate=1e-2, batch_size=2).run(model)
        pictures = found.draw(model.prompts, model.seeds)
    assert (pictures - before).abs().max() > 0.01  # it did learn
    assert found.report["curve"] == [[1, 0.0], [2, 0.0], [4, 1.0], [5, 1.0]]
    assert found.report["steps_needed"] == 4
    assert found.text == "back after 4 steps"
    looked_at = 4 * model.num_pictures
    assert found.cost.unet_forwards == (NUM_REFERENCES + looked_at) * forwards_per_picture + 5 * 2
    assert found.cost.unet_backwards == 5 * 2


def test_what_does_not_come_back(attacked: Attacked) -> None:
    found = Relearning(steps=1).run(attacked(judge=After(rounds=9)))
    assert found.report["steps_needed"] is None
    assert found.text == "not back after 1 steps"


def test_it_trains_the_edited_weights_towards_the_pictures(attacked: Attacked) -> None:
    """Only they move, and the loss on the pictures falls."""
    model = attacked()
    parameters = model.pipeline.named_parameters()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    moved: set[str] = set()
    draw = model.draw

    def look(*args: object) -> Tensor:
        moved.update(name for name, p in parameters.items() if not torch.equal(p, values[name]))
        return draw(*args)  # type: ignore[arg-type]

    model.draw = look  # type: ignore[method-assign]
    Relearning(steps=2).run(model)
    assert moved == set(model.pretrained.parameters)


class Sees:
    """A judge that sees the concept in the pictures with these numbers, counted over all that it is asked about."""

    name = "sees"

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers, self.asked = set(numbers), 0

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        first, self.asked = self.asked, self.asked + len(images)
        return torch.tensor([float(number in self.numbers) for number in range(first, self.asked)])


def test_pictures_of_others_are_the_unedited_models_and_do_not_show_the_concept(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    others = [f"a cat {number}" for number in range(80)]
    model = attacked(others=others, judge=Sees([0, 7]))
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        references = draw_others(model)
    assert references.prompts == [prompt for i, prompt in enumerate(others[::2]) if i not in (0, 7)]
    seeds = [REFERENCE_SEED + 1, REFERENCE_SEED + 8]
    with model.pretrained.restored():
        expected = model.pipeline.draw_latents(model.pipeline.encode(["a cat 2", "a cat 16"]), seeds, 2, 4.0)
    assert_close(references.latents[[0, 6]], expected, rtol=0, atol=1e-5)  # batches of other sizes differ a little
    with pytest.raises(ValueError, match=r"dog: the judge 'sees' sees it in all of 40 pictures of retained concepts"):
        draw_others(attacked(others=others, judge=Sees(range(40))))
    # The attack learns from nothing else: it draws these pictures and those that measure its progress.
    found = Relearning(steps=2, pictures="others").run(attacked(others=["a cat"], judge=Sees([])))
    looked_at = 2 * model.num_pictures
    assert found.cost.unet_forwards == (NUM_OTHERS + looked_at) * forwards_per_picture + 2 * 4
    assert found.report["curve"] == [[1, 0.0], [2, 0.0]]


def test_training_on_others_lowers_their_loss(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[Tensor] = []

    def noted(*args: object) -> Tensor:
        losses.append(denoising_errors(*args))  # type: ignore[arg-type]
        return losses[-1]

    monkeypatch.setattr("lit_unlearn.attacks.relearning.denoising_errors", noted)
    found = []
    for rate in (1e-9, 1e-2):  # the same pictures and noises, and with the first rate the weights hardly move
        losses.clear()
        model = attacked(others=["a cat", "an owl"], judge=Sees([]))
        Relearning(steps=24, learning_rate=rate, pictures="others", parts="all").run(model)
        found.append(torch.cat(losses[8:]).detach())
    gain = found[0] - found[1]
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5  # by more than the noises' part in it


def moved_weights(model: AttackedModel, attack: Relearning) -> dict[str, Tensor]:
    """Changes of the weights that move, by full name, as they are when the last pictures are drawn."""
    parameters = model.pipeline.named_parameters()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    changes: dict[str, Tensor] = {}
    draw = model.draw

    def look(*args: object) -> Tensor:
        changes.update({n: p.detach() - values[n] for n, p in parameters.items() if not torch.equal(p, values[n])})
        return draw(*args)  # type: ignore[arg-type]

    model.draw = look  # type: ignore[method-assign]
    attack.run(model)
    return changes


@pytest.mark.parametrize("parts", ["edited", "all"])
def test_a_rank_limits_the_change_of_each_matrix(
    parts: Literal["edited", "all"], attacked: Attacked, untouched: Callable[..., object]
) -> None:
    model = attacked(edits="attn2.to_")  # with the biases of to_out
    trained_ones = model.pretrained.parameters if parts == "edited" else denoiser_parameters(model)
    matrices = {name for name, p in trained_ones.items() if p.ndim > 1}
    assert matrices < set(trained_ones)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        changes = moved_weights(model, Relearning(steps=3, rank=2, parts=parts))
    assert set(changes) == matrices
    for change in changes.values():
        values = torch.linalg.svdvals(change.double().flatten(1))
        assert (values[2:] < 1e-3 * values[0]).all()  # float32: the sum with the weight is rounded
        assert values[1] > 0


def test_all_parts_are_those_of_the_denoiser(attacked: Attacked, untouched: Callable[..., object]) -> None:
    model = attacked(edits="text_encoder.encoder.layers.1.mlp.fc2.weight")
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        changes = moved_weights(model, Relearning(steps=2, parts="all"))
    assert set(changes) == {name for name in model.pipeline.named_parameters() if name.startswith("unet.")}
    assert Relearning(steps=2, parts="all").run(model).report["curve"] == [[1, 1.0], [2, 1.0]]


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        ({"rank": 4}, {"a": (8, 3), "b": (9,)}, r"relearning\.rank=4 must be less than 3, the full rank of the edited"),
        ({"rank": 3}, {"a": (8, 3)}, r"relearning\.rank=3 must be less than 3"),
        ({"rank": 1}, {"b": (9,)}, r"relearning\.rank=1: none of the edited weights is a matrix, so leave it out"),
        ({"rank": 2}, {"a": (8, 3), "b": (9,)}, None),
        ({"rank": 4}, {"a": (8, 3), "c": (6, 2, 3, 3)}, None),
        ({"rank": 4, "parts": "all"}, {"b": (9,)}, None),
        ({}, {"b": (9,)}, None),
    ],
)
def test_a_rank_that_limits_nothing(
    settings: dict[str, Any], weights: dict[str, tuple[int, ...]], message: str | None
) -> None:
    edited = {name: torch.zeros(shape) for name, shape in weights.items()}
    attack = Relearning(**settings)
    if message is None:
        attack.check(edited)
    else:
        with pytest.raises(ValueError, match=message):
            attack.check(edited)


def test_names_and_learning_rates_of_its_variants() -> None:
    attacks = [
        Relearning(),
        Relearning(pictures="others"),
        Relearning(rank=4),
        Relearning(pictures="others", rank=8, parts="all", learning_rate=1e-4),
    ]
    assert [attack.label for attack in attacks] == [
        *("relearning", "relearning_others", "relearning_rank4", "relearning_others_rank8_all"),
    ]
    assert [attack.settings()["learning_rate"] for attack in attacks] == [1e-3, 1e-3, 1e-2, 1e-4]


def test_weights_return_after_an_error(attacked: Attacked, untouched: Callable[..., object]) -> None:
    model = attacked()
    with untouched(model.pipeline), pytest.raises(ZeroDivisionError), trained(model.pretrained.parameters) as weights:  # type: ignore[attr-defined]
        assert all(weight.requires_grad for weight in weights)
        with torch.no_grad():
            weights[0].add_(1)
        _ = 1 / 0


def test_an_edit_that_is_none_is_back_at_once() -> None:
    """The whole chain on the embedded model: what was never gone is shown before and under attack."""
    components = load_copy("emoji-sd")
    name = "text_encoder.embeddings.token_embedding.weight"
    model = AttackedModel(
        components,
        PretrainedValues({name: components.named_parameters()[name]}),
        load_concept_set("emoji20").get("apple"),
        EmojiJudge(),
        num_inference_steps=6,
        guidance_scale=4.0,
        num_pictures=4,
    )
    assert model.verdicts(model.draw(model.prompts, model.seeds)) == [True] * 4
    found = Relearning(steps=1).run(model)
    assert found.report["curve"] == [[1, 1.0]]
    assert found.report["steps_needed"] == 1
    assert model.verdicts(found.draw(model.prompts, model.seeds)) == [True] * 4
    other = replace(model, concept=load_concept_set("emoji20").get("castle"))
    assert model.verdicts(other.draw(other.prompts, other.seeds)) == [False] * 4  # the judge does not see it everywhere
