from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lit_unlearn.attacks.base import NUM_REFERENCES, Attack, AttackedModel, Found
from lit_unlearn.attacks.concept_inversion import ConceptInversion
from lit_unlearn.attacks.prompt_search import SCORED, PromptSearch
from lit_unlearn.attacks.relearning import Relearning
from lit_unlearn.attacks.restarts import NUM_VALIDATION, RestartableAttack, check_restarts
from lit_unlearn.attacks.ring_a_bell import RingABell

Attacked = Callable[..., AttackedModel]


class Light:
    """A judge that sees the concept in pictures that are not black, and cannot tell about white ones."""

    name = "light"

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        means = images.mean(dim=(1, 2, 3))
        return torch.where(means == 1, torch.nan, (means > 0).float())


@dataclass(frozen=True, kw_only=True)
class Shades(RestartableAttack):
    """Its start ``i`` draws the shades ``shades[i]``, in turn, and has the loss ``losses[i]``."""

    name: ClassVar[str] = "shades"
    learns_from_pictures: ClassVar[bool] = False
    shades: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    drawn: list[tuple[str, int]] = field(default_factory=list)

    def search_from(self, model: AttackedModel, start: int) -> Found:
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            self.drawn.extend(zip(prompts, seeds, strict=True))
            own = self.shades[start]
            return torch.tensor([own[i % len(own)] for i in range(len(seeds))]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

        return Found(f"start {start}", draw, loss=self.losses[start])


@pytest.mark.parametrize(
    ("shades", "losses", "kept"),
    [
        (((0.0, 0.5), (0.5, 0.5), (0.0, 0.0)), (1.0, 3.0, 2.0), 1),  # most pictures, though its loss is the largest
        (((0.0, 0.5), (0.5, 0.0), (0.0, 0.0)), (3.0, 2.0, 1.0), 1),  # as many as another one, and a lower loss
        (((0.0, 0.5), (0.5, 0.0), (0.0, 0.0)), (2.0, 2.0, 1.0), 0),  # the first of equal ones
        (((0.0, 0.5), (1.0, 1.0), (0.0, 0.0)), (3.0, 2.0, 1.0), 0),  # no answer does not count
    ],
)
def test_the_start_that_shows_most_is_kept(
    attacked: Attacked, shades: tuple[tuple[float, ...], ...], losses: tuple[float, ...], kept: int
) -> None:
    model = attacked(judge=Light(), restarts=3)
    attack = Shades(shades=shades, losses=losses)
    found = attack.run(model)
    assert found.text == f"start {kept}"
    assert (found.report["restarts"], found.report["kept"]) == (3, kept + 1)
    expected = [sum(0 < shade < 1 for shade in own) / len(own) for own in shades]
    assert [start["shown"] for start in found.report["starts"]] == expected
    assert [start["loss"] for start in found.report["starts"]] == list(losses)
    # The same pictures for all starts: of edit prompts that name the concept, with seeds that no judged picture has.
    assert attack.drawn[:NUM_VALIDATION] == attack.drawn[NUM_VALIDATION : 2 * NUM_VALIDATION]
    assert {prompt for prompt, _ in attack.drawn} == {"a dog", "the dog at sunset"}
    assert not {seed for _, seed in attack.drawn} & set(model.seeds)
    assert len(attack.drawn) == 3 * NUM_VALIDATION


def test_one_start_draws_nothing(attacked: Attacked) -> None:
    attack = Shades(shades=((0.0,),), losses=(1.0,))
    found = attack.run(attacked(judge=Light()))
    assert (found.text, found.report, attack.drawn) == ("start 0", {}, [])


@pytest.mark.parametrize(
    "attack",
    [
        ConceptInversion(steps=3),
        PromptSearch(steps=3, num_tokens=2),
        RingABell(steps=3, num_tokens=2),
    ],
    ids=lambda attack: attack.name,
)
def test_the_first_start_is_that_of_a_single_search(
    attack: RestartableAttack, attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    alone, model = attack.run(attacked()), attacked(restarts=3)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = attack.run(model)
    starts = found.report["starts"]
    assert (starts[0]["found"], starts[0]["loss"]) == (alone.text, alone.loss)
    assert len({start["loss"] for start in starts}) == 3  # the others are others
    best = min(range(3), key=lambda start: starts[start]["loss"])  # the judge sees the concept with all of them
    assert found.report["kept"] == best + 1
    assert found.loss == starts[best]["loss"]
    references = NUM_REFERENCES * forwards_per_picture if attack.learns_from_pictures else 0
    search = alone.cost.unet_forwards - references
    validated = 3 * NUM_VALIDATION * forwards_per_picture
    assert found.cost.unet_forwards == references + 3 * search + validated
    assert found.cost.unet_backwards == 3 * alone.cost.unet_backwards


def test_losses_are_those_of_what_was_found(attacked: Attacked) -> None:
    """More steps on the same pictures and noises lower them."""
    for kind in (PromptSearch, RingABell):
        few, many = (kind(steps=steps, num_tokens=2).run(attacked()).loss for steps in (1, 30))
        assert 0 < many < few
    assert SCORED == 16  # noised pictures for each loss of the prompt search


def test_what_has_no_start_is_said_or_refused() -> None:
    attacks: list[Attack] = [PromptSearch(), Relearning()]
    assert check_restarts(attacks, 1) == check_restarts([Relearning()], 1) == []
    assert check_restarts(attacks, 3) == ["restarts=3 has no effect on relearning, without a random start."]
    with pytest.raises(ValueError, match=r"restarts=3 has no effect on relearning, without a random start: leave it"):
        check_restarts([Relearning()], 3)
    with pytest.raises(ValueError, match="restarts=0 must be at least 1"):
        check_restarts(attacks, 0)
