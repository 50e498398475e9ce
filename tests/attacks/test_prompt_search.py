from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.attacks.base import NUM_REFERENCES, AttackedModel, denoising_errors, noise_draws
from lit_unlearn.attacks.prompt_search import EACH_SCORED, SCORED, EachSearch, PromptSearch, tokenize_apart
from lit_unlearn.attacks.token_search import one_hot
from lit_unlearn.diffusion.sampling import seeded

Attacked = Callable[..., AttackedModel]


@torch.no_grad()
def losses(model: AttackedModel, prefix: str) -> torch.Tensor:
    """The denoising loss with a prefix in words, on each of 64 noises that no search has seen."""
    references = model.references
    rows, noise, timesteps = noise_draws(
        references.latents, model.pipeline.noise, [seeded("held out", i) for i in range(64)], (0.3, 0.9)
    )
    prompts = [f"{prefix} {references.prompts[row]}".strip() for row in rows]
    condition = model.pipeline.encode(prompts)
    return denoising_errors(model.pipeline, condition, references.latents[rows], noise, timesteps)


def test_a_prefix_of_words_that_denoises_better(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    model = attacked()
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = PromptSearch(steps=25, num_tokens=3).run(model)
    prefix = found.report["prefix"]
    tokenizer = model.pipeline.tokenizer
    assert len(tokenizer(prefix, add_special_tokens=False).input_ids) == 3
    assert not model.concept.find_name(prefix)
    assert found.text == f"{prefix} one dog"
    gain = losses(model, "") - losses(model, prefix)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5  # by more than the noises' part in it
    # Scored after steps 10 and 20, and the last.
    assert found.cost.unet_forwards == NUM_REFERENCES * forwards_per_picture + 25 * 8 + 3 * SCORED
    assert found.cost.unet_backwards == 25 * 8
    expected = model.draw([f"{prefix} {prompt}" for prompt in model.prompts], model.seeds)
    assert torch.equal(found.draw(model.prompts, model.seeds), expected)


def test_the_same_seed_finds_the_same_words(attacked: Attacked) -> None:
    attack = PromptSearch(steps=3)
    texts = [attack.run(attacked(seed=seed)).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_names_may_be_allowed(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def search(losses: object, shape: tuple[int, int, int], *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(shape[2])
        return torch.zeros(shape[:2], dtype=torch.long), torch.zeros(shape[0])

    monkeypatch.setattr("lit_unlearn.attacks.prompt_search.search_tokens", search)
    for exclude_names in (True, False):
        PromptSearch(exclude_names=exclude_names).run(attacked())
    assert seen[1] == seen[0] + 1


# --- a prefix for each picture


class Script:
    """A judge that answers from a list, one round of questions after the other, and notes how many there were."""

    name = "script"

    def __init__(self, *rounds: Sequence[int]) -> None:
        self.rounds, self.asked = list(rounds), []  # type: ignore[var-annotated]

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.asked.append(len(images))
        return torch.tensor(self.rounds.pop(0) if self.rounds else [0] * len(images)).float()


def test_each_picture_has_its_own_search(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    """The first needs no prefix, the second is shown at the second look, the third and fourth never."""
    judge = Script([1, 0, 0, 0], [0, 0, 0], [1, 0, 0])
    model = attacked(judge=judge, num_pictures=4)
    attack = PromptSearch(steps=25, num_tokens=3, per_prompt=True)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = attack.run(model)
        pictures = found.draw(model.prompts, model.seeds)
    texts = found.report["prompts"]
    assert texts[0] == "one dog"
    assert len(set(texts)) == 4
    for text in texts[1:]:
        prefix = text.removesuffix(" one dog")
        assert len(model.pipeline.tokenizer(prefix, add_special_tokens=False).input_ids) == 3
        assert not model.concept.find_name(prefix)
    assert judge.asked == [4, 3, 3, 2]  # looked at after steps 10 and 20, and the last
    assert found.report["looks"] == [1, 3, 4, 4]
    assert_close(pictures, model.draw(texts, model.seeds), rtol=0, atol=0)
    # Unedited and edited pictures, 20 steps for three pictures and 5 for two of them, scores, and looks.
    steps, scores, looks = 2 * (20 * 3 + 5 * 2), EACH_SCORED * (3 + 3 + 2), 3 + 3 + 2
    assert found.cost.unet_forwards == steps + scores + (4 + 4 + looks) * forwards_per_picture
    assert found.cost.unet_backwards == steps


def test_each_prefix_is_learned_from_the_picture_s_own(attacked: Attacked) -> None:
    """It lowers the loss on the unedited model's picture of the same prompt and seed."""
    model = attacked(judge=Script(), num_pictures=3)
    attack = PromptSearch(steps=40, num_tokens=3, per_prompt=True)
    texts = attack.run(model).report["prompts"]
    with model.pretrained.restored():
        own = model.pipeline.draw_latents(model.pipeline.encode(model.prompts), model.seeds, 2, 4.0)
    _, noise, timesteps = noise_draws(own, model.pipeline.noise, [seeded("held out", i) for i in range(64)], (0.3, 0.9))

    @torch.no_grad()
    def errors(text: str, picture: Tensor) -> Tensor:
        condition = model.pipeline.encode([text]).expand(64)
        return denoising_errors(model.pipeline, condition, picture.expand(64, -1, -1, -1), noise, timesteps)

    assert_close(EachSearch(attack, model).latents, own, rtol=0, atol=1e-5)
    pairs = list(zip(texts, own, strict=True))
    gains = torch.cat([errors("one dog", picture) - errors(text, picture) for text, picture in pairs])
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5  # by more than the noises' part in it


def test_the_loss_of_each_picture_is_that_of_its_own_prompt(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[Callable[[Tensor, int], Tensor]] = []

    def search(given: Callable[[Tensor, int], Tensor], shape: tuple[int, ...], *_: object, **__: object) -> object:
        losses.append(given)
        return torch.zeros(shape[:2], dtype=torch.long), torch.zeros(shape[0])

    monkeypatch.setattr("lit_unlearn.attacks.prompt_search.search_tokens", search)
    model = attacked(judge=Script())
    search_each = EachSearch(PromptSearch(per_prompt=True, num_tokens=3), model)
    numbers, allowed = torch.tensor([2, 0]), search_each.allowed
    search_each.run(numbers, 0)
    places = torch.randint(len(allowed), (2, 3), generator=seeded(0))
    found = losses[0](one_hot(places, len(allowed)), 7)
    for place, number in enumerate(numbers):
        text = f"{model.pipeline.words_of(allowed[places[place]])} one dog"
        picture = search_each.latents[number].expand(2, -1, -1, -1)
        items = [seeded(model.seed, "prompt_search", 7, item) for item in (2 * place, 2 * place + 1)]
        _, noise, timesteps = noise_draws(picture, model.pipeline.noise, items, (0.3, 0.9))
        with torch.no_grad():
            errors = denoising_errors(model.pipeline, model.pipeline.encode([text] * 2), picture, noise, timesteps)
        assert_close(found[place], errors.mean(), rtol=1e-4, atol=0)  # float32, and batches of other sizes
    assert not torch.isclose(found[0], found[1], rtol=1e-3)


def test_other_starts_are_for_pictures_that_are_not_shown(attacked: Attacked) -> None:
    judge = Script([0, 0, 0], [1, 0, 0], [0, 0], [0, 1])
    found = PromptSearch(steps=2, num_tokens=2, per_prompt=True).run(attacked(judge=judge, restarts=3))
    assert judge.asked == [3, 3, 2, 2]
    assert found.report["looks"] == [2, 4, 4]
    assert (found.report["restarts"], found.report["shown_after"]) == (3, pytest.approx([1 / 3, 1 / 3, 2 / 3]))
    nothing_left = PromptSearch(steps=2, per_prompt=True).run(attacked(restarts=2))
    assert nothing_left.report["prompts"] == ["one dog"] * 3
    assert nothing_left.report["shown_after"] == [1.0, 1.0]


@pytest.mark.parametrize(("batch_size", "asked"), [(2, [3, 3]), (5, [3, 2, 1]), (10, [3, 1, 1, 1]), (20, [3, 1, 1, 1])])
def test_steps_with_many_noised_pictures_hold_few_searches(
    batch_size: int, asked: list[int], attacked: Attacked
) -> None:
    judge = Script()
    PromptSearch(steps=2, num_tokens=2, per_prompt=True, batch_size=batch_size).run(attacked(judge=judge))
    assert judge.asked == asked


def test_the_best_of_all_starts_is_kept(attacked: Attacked) -> None:
    model = attacked(judge=Script(), restarts=1)
    attack = PromptSearch(steps=2, num_tokens=2, per_prompt=True)
    search = EachSearch(attack, model)
    losses = []
    for start in range(3):
        search.run(search.open, start)
        losses.append(search.losses.clone())
    assert (losses[2] <= losses[1]).all() and (losses[1] <= losses[0]).all()
    assert (losses[2] < losses[0]).any()
    assert attack.run(attacked(judge=Script(), restarts=3)).report["prompts"] == search.texts


def test_learned_tokens_of_each_template(attacked: Attacked) -> None:
    pipeline = attacked().pipeline
    tokens = tokenize_apart(pipeline, ["{} one dog", "a {} dog"], 2)
    embeddings = torch.randn(4, pipeline.texts[0].table.shape[1], generator=seeded(0))
    both = pipeline.encode(tokens, embeddings).states
    for row, template in enumerate(("{} one dog", "a {} dog")):
        own = embeddings[2 * row : 2 * row + 2]
        alone = pipeline.encode(pipeline.tokenize_templates([template], 2), own).states
        assert_close(both[row], alone[0], rtol=0, atol=1e-5)  # batches of other sizes differ in the last bits


def test_its_name_and_settings() -> None:
    attacks = PromptSearch(), PromptSearch(per_prompt=True), PromptSearch(per_prompt=True, batch_size=3)
    assert [attack.label for attack in attacks] == ["prompt_search", "prompt_search_each", "prompt_search_each"]
    assert [attack.settings()["batch_size"] for attack in attacks] == [8, 2, 3]
    with pytest.raises(ValueError, match=r"prompt_search\.batch_size=0 must be at least 1"):
        PromptSearch(per_prompt=True, batch_size=0)
