from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import load_copy
from lit_unlearn.attacks.base import (
    NUM_REFERENCES,
    Attack,
    AttackedModel,
    Found,
    denoising_errors,
    measure,
    noise_draws,
)
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import decode_latents, seeded

Attacked = Callable[..., AttackedModel]


class Bright:
    """A judge that sees the concept where a picture's mean is above ``threshold``; it cannot tell below ``blind``."""

    name = "bright"

    def __init__(self, threshold: float, blind: float = 0.0) -> None:
        self.threshold, self.blind = threshold, blind

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        means = images.mean(dim=(1, 2, 3))
        return torch.where(means < self.blind, torch.nan, (means > self.threshold).float())


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd2"])
def test_the_loss_is_that_of_the_training(name: str, request: pytest.FixtureRequest) -> None:
    components = load_copy(str(request.getfixturevalue(name)))
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=seeded(0))
    timesteps = torch.tensor([10, 500, 990])
    states = encode_prompts(components.tokenizer, components.text_encoder, ["a dog", "a cat", ""])
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[timesteps]
    alpha, sigma = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    noisy = (alpha * latents + sigma * noise).float()
    target = noise if name == "tiny_sd" else (alpha * noise - sigma * latents)
    output = components.unet(noisy, timesteps, states).sample
    expected = [float((output[i] - target[i]).double().square().mean()) for i in range(3)]
    found = denoising_errors(components, Condition(states), latents, noise, timesteps)
    assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)  # float32 throughout


def test_what_a_step_looks_at_belongs_to_its_items(components: StableDiffusion) -> None:
    latents = torch.zeros(4, 1, 2, 2)
    window = (0.3, 0.9)
    rows, noise, timesteps = noise_draws(latents, components.noise, [seeded("a", i) for i in range(200)], window)
    assert set(rows.tolist()) == {0, 1, 2, 3}
    assert 300 <= timesteps.min() < 310
    assert 890 < timesteps.max() < 900
    again = noise_draws(latents, components.noise, [seeded("a", i) for i in (7, 3)], window)
    for values, same in zip((rows, noise, timesteps), again, strict=True):
        assert torch.equal(values[[7, 3]], same)
    assert noise[7].ne(noise[3]).all()


def test_pictures_are_of_direct_prompts_and_their_own_seeds(attacked: Attacked) -> None:
    model = attacked(num_pictures=12)
    assert model.prompts == ["one dog"] * 12
    assert len(set(model.seeds)) == 12
    assert not set(model.seeds) & set(attacked(num_pictures=12, seed=1).seeds)
    pictures = model.draw(model.prompts, model.seeds)  # in two batches
    expected = model.pipeline.draw(model.prompts[9:11], model.seeds[9:11], 2, 4.0)
    assert_close(pictures[9:11], expected, rtol=0, atol=1e-5)  # batches of other sizes differ in the last bits
    assert torch.equal(pictures, attacked(num_pictures=12).draw(model.prompts, model.seeds))


def test_it_learns_from_the_unedited_models_pictures(
    attacked: Attacked, untouched: Callable[..., object], forwards_per_picture: int
) -> None:
    model = attacked()
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        references = model.references
    assert set(references.prompts) == {"a dog", "the dog at sunset"}
    assert len(references.latents) == NUM_REFERENCES
    assert references.cost.unet_forwards == NUM_REFERENCES * forwards_per_picture
    assert references.cost.unet_backwards == 0
    unedited = attacked(edits="no weight")
    assert torch.equal(references.latents, unedited.references.latents)
    model.pretrained = PretrainedValues({})  # from now on the edited weights pass for unedited ones
    del model.references
    assert not torch.isclose(model.references.latents, references.latents).all(-1).all(-1).any()


def test_it_learns_from_pictures_that_show_the_concept(attacked: Attacked, forwards_per_picture: int) -> None:
    model = attacked()
    means = decode_latents(model.pipeline.vae, model.references.latents).mean(dim=(1, 2, 3))
    picky = attacked(judge=Bright(float(means.sort().values[4:6].mean())))  # five of the first ten pass
    references = picky.references
    shown = decode_latents(picky.pipeline.vae, references.latents).mean(dim=(1, 2, 3))
    assert shown.min() > picky.judge.threshold  # type: ignore[attr-defined]
    assert references.cost.unet_forwards in (20 * forwards_per_picture, 30 * forwards_per_picture)
    with pytest.raises(
        ValueError, match="dog: according to the judge 'bright' the unedited model shows it in none of 30"
    ):
        _ = attacked(judge=Bright(1.0)).references


def test_pictures_that_the_judge_cannot_tell_are_left_out(attacked: Attacked) -> None:
    pictures = torch.tensor([0.1, 0.4, 0.6, 0.9]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    assert attacked(judge=Bright(0.5)).verdicts(pictures) == [False, False, True, True]
    assert attacked(judge=Bright(0.5, blind=0.3)).verdicts(pictures) == [False, True, True]
    with pytest.raises(ValueError, match="'bright' gave no answer for any of 4 pictures of dog"):
        attacked(judge=Bright(0.5, blind=1.0)).verdicts(pictures)


def test_guidance_leads_away_from_the_negative_prompt(attacked: Attacked) -> None:
    model = attacked(negative_prompt="a cat", guidance_scale=3.0, run_guidance_scale=4.0)
    pipeline = model.pipeline
    condition, negative = pipeline.encode(model.prompts), pipeline.encode(["a cat"])
    expected = pipeline.decode(pipeline.draw_latents(condition, model.seeds, 2, 3.0, negative))
    assert torch.equal(model.draw(model.prompts, model.seeds), expected)
    plain = attacked(guidance_scale=3.0)
    assert (plain.draw(model.prompts, model.seeds) - expected).abs().max() > 1e-3
    # What it learns from is what it would learn from without these settings.
    assert torch.equal(model.references.latents, attacked(guidance_scale=4.0).references.latents)
    assert not torch.equal(model.references.latents, plain.references.latents)


def test_the_negative_prompt_is_read_by_the_weights_as_they_are(attacked: Attacked) -> None:
    model = attacked(edits="layers.1.mlp.fc2", negative_prompt="a cat")
    edited = model.unconditional()
    with model.pretrained.restored():
        unedited = model.unconditional()
    assert edited is not None and unedited is not None
    assert (edited.states - unedited.states).abs().max() > 1e-2
    assert attacked().unconditional() is None


def test_pictures_for_comparison_are_not_part_of_the_cost(attacked: Attacked, forwards_per_picture: int) -> None:
    class Compares(Attack):
        name = "compares"
        learns_from_pictures = False

        def search(self, model: AttackedModel) -> Found:
            model.draw(["a"], [0])
            with measure(model.pipeline.denoiser) as meter:
                model.draw(["a", "b"], [0, 1])
            return Found("", model.draw, uncounted=meter.cost)

    cost = Compares().run(attacked()).cost
    assert (cost.unet_forwards, cost.unet_backwards) == (forwards_per_picture, 0)
    assert cost.seconds > 0


def test_pictures_by_the_unedited_model_are_drawn_as_the_run_draws(attacked: Callable[..., AttackedModel]) -> None:
    plain, other = attacked(), attacked(guidance_scale=1.0, run_guidance_scale=4.0, negative_prompt="a cat")
    expected = plain.unedited_latents(["a dog", "an owl"], [3, 4])
    assert torch.equal(other.unedited_latents(["a dog", "an owl"], [3, 4]), expected)
    assert not torch.equal(attacked(guidance_scale=1.0).unedited_latents(["a dog", "an owl"], [3, 4]), expected)
