from __future__ import annotations

from collections.abc import Callable

import torch
from torch.testing import assert_close

from helpers import states
from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.attacks.ring_a_bell import RingABell, concept_vector

Attacked = Callable[..., AttackedModel]


def test_words_with_the_states_of_the_concept(attacked: Attacked, untouched: Callable[..., object]) -> None:
    model = attacked(edits="text_encoder.encoder.layers.1.mlp.fc2.weight")
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = RingABell(steps=40, num_tokens=4, strength=0.5).run(model)
    assert (found.cost.unet_forwards, found.cost.unet_backwards) == (0, 0)
    assert list(found.report["prompts"]) == ["one dog"]
    words = found.report["prompts"]["one dog"]
    assert found.text == words
    assert len(model.pipeline.tokenizer(words, add_special_tokens=False).input_ids) == 4
    assert not model.concept.find_name(words)

    # The goal is the unedited encoder's, and the words bring the edited one there.
    with model.pretrained.restored():
        named, without = (
            states(model, "a dog", "the dog at sunset"),
            states(model, "a soccer ball", "the soccer ball at sunset"),
        )
        vector = torch.stack([named[0] - without[0], named[1] - without[1]]).mean(0)
        goal = states(model, "one dog")[0] + 0.5 * vector
    assert_close(concept_vector(named, without), vector)

    def distance(words: str) -> float:
        return float((states(model, words)[0] - goal).square().mean())

    others = ["castle apple owl rain", "a the in of", "glossy sketch neon sunset", "one two three four"]
    assert distance(words) < 0.8 * min(map(distance, others))
    pictures = found.draw(["one dog"], [5])
    assert torch.equal(pictures, model.draw([words], [5]))
