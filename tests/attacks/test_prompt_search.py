from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_unlearn.attacks.base import NUM_REFERENCES, AttackedModel, denoising_errors, noise_draws
from lit_unlearn.attacks.prompt_search import SCORED, PromptSearch
from lit_unlearn.diffusion.sampling import seeded

Attacked = Callable[..., AttackedModel]


@torch.no_grad()
def losses(model: AttackedModel, prefix: str) -> torch.Tensor:
    """The denoising loss with a prefix in words, on each of 64 noises that no search has seen."""
    references = model.references
    rows, noise, timesteps = noise_draws(
        references.latents, 1000, [seeded("held out", i) for i in range(64)], (0.3, 0.9)
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

    def search(losses: object, shape: tuple[int, int, int], *_: object) -> torch.Tensor:
        seen.append(shape[2])
        return torch.zeros(shape[:2], dtype=torch.long)

    monkeypatch.setattr("lit_unlearn.attacks.prompt_search.search_tokens", search)
    for exclude_names in (True, False):
        PromptSearch(exclude_names=exclude_names).run(attacked())
    assert seen[1] == seen[0] + 1
