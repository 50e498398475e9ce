"""Every attack on every family: it runs, leaves the weights alone, and draws what the prompts alone do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import load_copy
from lit_unlearn.attacks.base import Attack, AttackedModel
from lit_unlearn.attacks.completion import Completion
from lit_unlearn.attacks.concept_inversion import ConceptInversion
from lit_unlearn.attacks.image_to_image import ImageToImage
from lit_unlearn.attacks.inpainting import Inpainting
from lit_unlearn.attacks.inversion import Inversion
from lit_unlearn.attacks.noise_probe import NoiseProbe
from lit_unlearn.attacks.prompt_levels import PromptLevels
from lit_unlearn.attacks.prompt_search import PromptSearch
from lit_unlearn.attacks.relearning import Relearning
from lit_unlearn.attacks.ring_a_bell import RingABell, blocks, distances
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.families import Flux
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.methods.textual_inversion import inversion_loss

FAMILIES = {
    "tiny_sdxl": "attn2.to_v",
    "tiny_sd3": "context_embedder.weight",
    "tiny_sd3_without_t5": "attn.add_v_proj.weight",
    "tiny_flux": "context_embedder.weight",
    "tiny_pixart": "attn2.to_v",
}
"""The models, and what of each is edited."""


class Always:
    """A judge that gives one answer to all questions."""

    name = "always"

    def __init__(self, answer: float = 1.0) -> None:
        self.answer = answer

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        return torch.full((len(images),), self.answer)


QUICK: list[Attack] = [
    ConceptInversion(steps=2, batch_size=2, learning_rate=0.1),
    PromptSearch(steps=1, num_tokens=2, batch_size=2),
    RingABell(steps=2, num_tokens=2),
    Relearning(steps=1, batch_size=2, rank=2, parts="all"),
]
LONGER: list[Attack] = [
    PromptSearch(steps=1, num_tokens=2, batch_size=2, per_prompt=True),
    Completion(share=0.5, sampler_steps=2),
    NoiseProbe(scales=(1.5,)),
    ImageToImage(strength=0.5),
    Inpainting(),
    Inversion(sampler_steps=2),
    PromptLevels(pictures=1),
    Relearning(steps=1, batch_size=2),
    Relearning(steps=1, batch_size=2, parts="all"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, pets: str) -> AttackedModel:
    """An edited model whose dog is attacked; its pictures to learn from are drawn once."""
    folder: Path = request.getfixturevalue(request.param)
    pipeline: Any = load_copy(folder)
    if isinstance(pipeline, Flux):
        pipeline = replace(pipeline, sample_size=8)
    parameters = {n: p for n, p in pipeline.named_parameters().items() if FAMILIES[request.param] in n}
    pretrained, generator = PretrainedValues(parameters), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(parameter.std() * torch.randn(parameter.shape, generator=generator))
    return AttackedModel(pipeline, pretrained, load_concept_set(pets).get("dog"), Always(), 2, 4.0, num_pictures=2)


@pytest.fixture
def untouched_model(model: AttackedModel) -> Iterator[AttackedModel]:
    """The model, whose weights are afterwards what they were, to the last bit, and frozen."""
    before = {name: value.detach().clone() for name, value in model.pipeline.named_parameters().items()}
    yield model
    for name, value in model.pipeline.named_parameters().items():
        assert torch.equal(value, before[name]), name
        assert not value.requires_grad and value.grad is None


def check(attack: Attack, model: AttackedModel) -> None:
    found = attack.run(model)
    pictures = found.draw(model.prompts, model.seeds)
    height, width = model.pipeline.picture_size
    assert pictures.shape == (2, 3, height, width)
    assert pictures.isfinite().all()
    assert (pictures - model.draw(model.prompts, model.seeds)).abs().max() > 1e-4 or attack.name == "prompt_search"
    for draw in found.controls.values():
        assert draw(model.prompts, model.seeds).isfinite().all()


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: attack.label)
def test_searches_and_low_rank_relearning(attack: Attack, untouched_model: AttackedModel) -> None:
    check(attack, untouched_model)


@pytest.mark.slow
@pytest.mark.parametrize("attack", LONGER, ids=lambda attack: attack.label)
def test_all_other_attacks(attack: Attack, untouched_model: AttackedModel) -> None:
    if attack.label == "prompt_search_each":
        untouched_model = replace(untouched_model, judge=Always(0.0))  # so that the search has something to find
    check(attack, untouched_model)


def test_a_token_is_learned_in_every_encoder_that_is_read(untouched_model: AttackedModel) -> None:
    model, pipeline = untouched_model, untouched_model.pipeline
    start = pipeline.initial_embeddings(1, None, seeded(model.seed, "concept inversion"))
    # One size for all encoders, so that one learning rate suits them.
    for part, text in zip(start.split(pipeline.token_widths, dim=1), pipeline.texts, strict=True):
        own = text.vocabulary_norm / text.table.shape[1] ** 0.5
        first = pipeline.texts[0].vocabulary_norm / pipeline.texts[0].table.shape[1] ** 0.5
        raw = text.initial_embeddings(1, "dog", torch.Generator())
        scaled = pipeline.initial_embeddings(1, "dog", torch.Generator()).split(pipeline.token_widths, dim=1)
        assert torch.allclose(scaled[pipeline.texts.index(text)] * (own / first), raw)
        assert part.shape == (1, text.table.shape[1])
    found = ConceptInversion(steps=24, batch_size=4, learning_rate=0.1).run(model)
    assert found.embeddings is not None and found.embeddings.shape == start.shape
    moved = (found.embeddings - start).split(pipeline.token_widths, dim=1)
    assert all(part.abs().mean() > 1e-2 for part in moved)

    def loss(embeddings: Tensor) -> float:
        prompts = pipeline.tokenize_templates(["a {}"] * 8, 1)
        with torch.no_grad():
            draws = [seeded("held out", number) for number in range(8)]
            return float(inversion_loss(pipeline, embeddings, prompts, model.references.latents, draws))

    assert loss(found.embeddings) < loss(start)


def test_ring_a_bell_compares_all_that_the_denoiser_reads(untouched_model: AttackedModel) -> None:
    pipeline = untouched_model.pipeline
    condition = pipeline.encode(["a dog", "a cat"])
    own = blocks(pipeline, condition)
    states = own if condition.pooled is None else own[:-1]
    assert [block.shape[1] for block in states] == [pipeline.texts[n].length for n in pipeline.token_order]
    assert condition.pooled is None or torch.equal(own[-1].squeeze(1), condition.pooled)
    vectors = [block[0] - block[1] for block in own]
    goals = [block[:1] + vector for block, vector in zip(own, vectors, strict=True)]
    # A whole vector away in every block is 1, whatever the blocks' sizes; of a single block it is its mean square.
    expected = 1.0 if len(own) > 1 else float(vectors[0].square().mean())
    assert distances([block[:1] for block in own], goals, vectors) == pytest.approx(expected, rel=1e-5)
    assert distances(goals, goals, vectors) == 0


def test_null_text_needs_an_empty_prompt(tiny_flux: Path, tiny_sd3: Path) -> None:
    attack = Inversion(sampler_steps=2, null_text_steps=1)
    with pytest.raises(ValueError, match=r"null_text_steps=1 has no effect on FLUX\.1, whose guidance does not lead"):
        attack.check_run(BaseModel.find(str(tiny_flux)), 2, 4.0)
    attack.check_run(BaseModel.find(str(tiny_sd3)), 2, 4.0)


@pytest.mark.slow
def test_null_text_brings_the_picture_back(untouched_model: AttackedModel) -> None:
    if not untouched_model.pipeline.takes_guidance:
        check(Inversion(sampler_steps=2, null_text_steps=1), untouched_model)
