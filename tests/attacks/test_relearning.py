from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import load_copy
from lit_unlearn.attacks.base import NUM_REFERENCES, AttackedModel
from lit_unlearn.attacks.relearning import Relearning, trained
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
