"""The losses of Concept Ablation against a version with two networks, and which weights learn from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from helpers import changed, frozen, started, weights
from lit_unlearn.data.augmentation import WORDS
from lit_unlearn.diffusion.parameters import match_parameters
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.methods.concept_ablation import ConceptAblation, masked_error

Ablation = Callable[..., ConceptAblation]
Fit = Callable[..., L.Trainer]

PAIRS = [("a dog", "a soccer ball"), ("the dog at sunset", "the soccer ball at sunset")]
"""Edit and target prompts of the dog in the concept set ``pets``."""
EMBEDDING = "text_encoder.embeddings.token_embedding.weight"


def begun(module: ConceptAblation, fit: Fit, **data: Any) -> ConceptAblation:
    """``module`` as it is before its first step, its weights moved as if by earlier ones."""
    started(module, fit, **data)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.pretrained.parameters.values():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return module


def gradients(module: ConceptAblation, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(module.pretrained.parameters.values()))
    return dict(zip(module.edited_names, found, strict=True))


# --- the loss


def plain_loss(
    module: ConceptAblation, batch: Tensor, unet: Any, text_encoder: Any, teacher: Any, **options: Any
) -> Tensor:
    """The paper's loss with a second network for the target, by diffusers' own noising."""
    draw = module.draw(batch, 1)
    config = {k: v for k, v in module.pipeline.scheduler.config.items() if k.startswith(("beta", "prediction"))}
    scheduler = DDPMScheduler(**config)
    noisy = scheduler.add_noise(draw.latents, draw.noise, draw.timesteps)
    velocity = scheduler.get_velocity(draw.latents, draw.noise, draw.timesteps)
    truth = velocity if config["prediction_type"] == "v_prediction" else draw.noise
    pairs = [PAIRS[item % 4 % 2] for item in batch.tolist()]
    concept, anchor = (
        encode_prompts(module.pipeline.tokenizer, text_encoder, prompts) for prompts in zip(*pairs, strict=True)
    )
    prediction = unet(noisy, draw.timesteps, concept).sample
    target = truth if options["objective"] == "noise" else teacher(noisy, draw.timesteps, anchor).sample
    loss = (prediction - target).square().mean()
    return loss + options["prior_weight"] * (unet(noisy, draw.timesteps, anchor).sample - truth).square().mean()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "model", "reference": "live", "prior_weight": 0.0},
        {"objective": "model", "reference": "live", "prior_weight": 0.2},
        {"objective": "model", "reference": "frozen", "prior_weight": 0.2},
        {"objective": "noise", "prior_weight": 0.0},
        {"objective": "noise", "prior_weight": 0.7},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_loss_and_gradient_equal_those_of_two_networks(
    options: dict[str, Any], model: str, ablation: Ablation, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = begun(ablation(model=str(request.getfixturevalue(model)), **options), fit)
    batch = torch.tensor([0, 3, 5, 6])
    student, teacher, text_encoder = (copy.deepcopy(part) for part in (module.unet, module.unet, module.text_encoder))
    if options.get("reference") == "frozen":
        for name, value in module.pretrained.values.items():
            teacher.get_parameter(name.removeprefix("unet.")).data.copy_(value)
    expected = plain_loss(module, batch, student, text_encoder, teacher.requires_grad_(False), **options)
    parameters = [student.get_parameter(name.removeprefix("unet.")) for name in module.edited_names]
    loss = module.training_step(batch, 1)
    # Float32 in another order of the same operations, the regulariser's forward being that of the target.
    assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(module, loss).values(), torch.autograd.grad(expected, parameters), strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_no_gradient_flows_into_the_target(ablation: Ablation, fit: Fit) -> None:
    module = begun(ablation(), fit)
    batch = torch.tensor([0, 1])
    ours = gradients(module, module.training_step(batch, 1))
    text_encoder, options = module.text_encoder, {"objective": "model", "prior_weight": 0.0}
    constant = copy.deepcopy(module.unet).requires_grad_(False)
    stopped = gradients(module, plain_loss(module, batch, module.unet, text_encoder, constant, **options))
    flowing = gradients(module, plain_loss(module, batch, module.unet, text_encoder, module.unet, **options))
    for name, gradient in ours.items():
        scale = float(gradient.abs().max())
        assert_close(gradient, stopped[name], rtol=1e-3, atol=1e-5 * scale)
        assert (gradient - flowing[name]).abs().max() > 0.1 * scale


def test_the_frozen_reference_is_the_model_as_it_was(ablation: Ablation, fit: Fit) -> None:
    module = ablation(reference="frozen", edited_parameters="full")
    module.configure_model()
    before = copy.deepcopy(module.unet)
    fit(module, steps=3, batch_size=2)
    inputs = (module.latents[:2], torch.tensor([10, 700]), module.anchor_known.states[:2])
    with torch.no_grad():
        expected = before(*inputs).sample
        assert torch.equal(frozen(module, *inputs), expected)
        assert not torch.equal(module.unet(*inputs).sample, expected)


def test_steps_lower_the_error(ablation: Ablation, fit: Fit) -> None:
    module = ablation()
    batch = torch.arange(8)
    first = begun(ablation(), fit)
    with first.pretrained.restored():
        before = first.training_step(batch, 50).item()
    fit(module, steps=25, batch_size=4)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    assert module.training_step(batch, 50).item() < 0.5 * before


def test_the_first_token_can_be_kept_from_learning(ablation: Ablation, fit: Fit) -> None:
    free, frozen = (begun(ablation(freeze_bos=freeze), fit) for freeze in (False, True))
    batch = torch.tensor([0, 1])
    layer = free.attention_inputs[0]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            inputs.append(args[0])
            outputs.append(output)

    handle = layer.register_forward_hook(record)
    loss = free.training_step(batch, 1)
    loss.backward()
    handle.remove()
    gradient, states = outputs[0].grad, inputs[0]
    assert gradient is not None
    ours = frozen.training_step(batch, 1)
    assert torch.equal(ours, loss)  # values stay
    ours.backward()
    # A linear layer's gradient is a sum over tokens: all of them, and all but the first.
    for module, start in ((free, 0), (frozen, 1)):
        found = module.attention_inputs[0].weight.grad
        expected = torch.einsum("blo,bli->oi", gradient[:, start:], states[:, start:])
        assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    first = torch.einsum("bo,bi->oi", gradient[:, 0], states[:, 0])
    assert first.abs().max() > 1e-2 * expected.abs().max()
    assert not any(layer._forward_hooks for layer in frozen.attention_inputs)


def test_the_error_counts_where_the_mask_is_true() -> None:
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert_close(masked_error(prediction, target, torch.ones(2, 1, 4, 4).bool()), (prediction - target).square().mean())
    mask = torch.zeros(2, 1, 4, 4).bool()
    mask[0, :, :2], mask[1, :, 3, 3] = True, True
    expected = ((prediction - target)[0, :, :2].square().mean() + (prediction - target)[1, :, 3, 3].square().mean()) / 2
    assert_close(masked_error(prediction, target, mask), expected)
    assert torch.equal(masked_error(prediction + 9 * ~mask, target, mask), masked_error(prediction, target, mask))


# --- what a step draws


def test_anchors_are_pictures_of_the_anchors_prompts(ablation: Ablation, fit: Fit) -> None:
    module = begun(ablation(concept=["dog", "cat"], images=3), fit)
    assert module.num_pairs == 6
    prompts = [module.anchor_prompts[place] for place in module.places]
    assert prompts == [PAIRS[0][1], PAIRS[1][1], PAIRS[0][1], "a parrot", "the parrot in the rain", "a parrot"]
    assert [module.concept_prompts[place] for place in module.places][3:5] == ["a cat", "the cat in the rain"]
    with module.pretrained.restored():
        unet, states = module.unet, module.anchor_known.states[module.places]
        scheduler = module.pipeline.scheduler.from_config(module.pipeline.scheduler.config)
        scheduler.set_timesteps(1)
        noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i % 3)) for i in range(6)])
        empty = encode_prompts(module.pipeline.tokenizer, module.text_encoder, [""]).expand_as(states)
        steps = noise
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                none, some = (unet(steps, timestep, condition).sample for condition in (empty, states))
            steps = scheduler.step(none + 4 * (some - none), timestep, steps).prev_sample
    # Another batch size, and guidance in one batch or two.
    assert_close(module.latents, steps, rtol=1e-3, atol=1e-4)


def test_anchors_have_their_own_sampling(ablation: Ablation, fit: Fit) -> None:
    plain = begun(ablation(), fit)
    own = begun(ablation(anchor_inference_steps=3, anchor_guidance_scale=1.0), fit)
    assert (plain.forwards.count, own.forwards.count) == (4 * 1 * 2, 4 * 3)  # with guidance, without it
    assert not torch.equal(plain.latents, own.latents)


def test_a_draw_belongs_to_seed_step_and_item(ablation: Ablation, fit: Fit) -> None:
    module = begun(ablation(augmentation=True), fit)
    state = torch.get_rng_state()
    batch = torch.arange(12)
    together = module.draw(batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for item in range(12):
        alone = module.draw(batch[item : item + 1], 3)
        for ours, theirs in zip(alone[1:], together[1:], strict=True):
            assert torch.equal(ours[0], theirs[item])
        # Pictures are encoded in batches.
        assert_close(alone.latents[0], together.latents[item], rtol=1e-4, atol=1e-4)
    assert len({float(value) for value in together.noise[:, 0, 0, 0]}) == 12
    assert not torch.equal(module.draw(batch, 4).noise, together.noise)
    module.seed += 1
    assert not torch.equal(module.draw(batch, 3).noise, together.noise)


def test_two_processes_descend_the_loss_of_one(ablation: Ablation, fit: Fit) -> None:
    module = begun(ablation(prior_weight=0.2), fit)
    whole, first, second = (
        gradients(module, module.training_step(torch.tensor(batch), 1)) for batch in ([0, 3, 5, 6], [0, 5], [3, 6])
    )
    for name, gradient in whole.items():
        # DDP averages the gradients of equal shares; float32 rounding of other batch sizes remains.
        assert_close((first[name] + second[name]) / 2, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_augmented_pictures_have_masks_and_words(ablation: Ablation, fit: Fit) -> None:
    plain, module = (begun(ablation(augmentation=augmentation), fit) for augmentation in (False, True))
    batch = torch.arange(40)
    assert plain.draw(batch, 0).mask.all()
    draw = module.draw(batch, 0)
    shares = draw.mask.float().mean(dim=(1, 2, 3))
    seen = set()
    for item, (place, share) in enumerate(zip(draw.prompts.tolist(), shares.tolist(), strict=True)):
        mine, theirs = PAIRS[item % 4 % 2]
        words = module.concept_prompts[place].removeprefix(mine)
        assert (module.concept_prompts[place], module.anchor_prompts[place]) == (mine + words, theirs + words)
        # Sides of 3 to 5 of 8 cells are far away, of 5 to 8 they are not.
        assert (share <= (5 / 8) ** 2) if words == ", far away" else (share >= (5 / 8) ** 2)
        seen.add(words)
    assert seen == set(WORDS)
    # Pixels are decoded once, and those of another picture are other pixels.
    assert set(module.pictures) == {0, 1, 2, 3}
    assert module.picture(0).shape == (3, 16, 16)
    assert not torch.equal(module.picture(0), module.picture(1))


def test_names_take_the_place_of_the_target_in_the_anchor(ablation: Ablation) -> None:
    added = ablation(prompts="names")
    assert (added.concept_prompts, added.anchor_prompts) == (["a toy, dog"], ["a toy"])
    replaced = ablation(prompts="names", concept_set="emoji20", concept=["pixel art", "rain"])
    assert replaced.concept_prompts == [
        "a picture in pixel art style",
        "a picture in pixel style",
        "a picture at rain",
        "a picture at rainy",
        "a picture at raining",
    ]
    assert set(replaced.anchor_prompts) == {"a picture in cartoon style", "a picture at sunset"}


# --- what learns


@pytest.mark.parametrize("group", ["xattn-kv", "full", r"text_encoder\..*mlp\.fc2\.weight"])
@pytest.mark.parametrize("objective", ["model", "noise"])
def test_the_group_moves_and_nothing_else(group: str, objective: str, ablation: Ablation, fit: Fit) -> None:
    module = ablation(edited_parameters=group, objective=objective, prior_weight=0.1)
    module.configure_model()
    before = weights(module)
    fit(module, batch_size=2)
    moved = changed(before, weights(module))
    assert moved == match_parameters(group, before) == module.edited_names
    assert module.report["weight_change_ratio"] > 1e-3


def test_only_the_concepts_own_rows_of_the_embedding_move(ablation: Ablation, fit: Fit) -> None:
    module = ablation(edited_parameters="embedding", optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5))
    module.configure_model()
    before = weights(module)
    fit(module, batch_size=2, steps=3)
    after = weights(module)
    assert changed(before, after) == [EMBEDDING]
    moved = (before[EMBEDDING] != after[EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
    assert module.pipeline.tokenizer.convert_ids_to_tokens(moved) == ["dog</w>"]


def test_rows_of_words_that_the_anchor_has_stay(ablation: Ablation) -> None:
    module = ablation(concept_set="emoji20", concept=["pixel art", "surfing"])
    module.configure_model()
    tokenizer = module.pipeline.tokenizer
    assert sorted(tokenizer.convert_ids_to_tokens(module.own_tokens(module.pipeline.texts[0]))) == [
        "art</w>",
        "pixel</w>",
        "surfing</w>",
    ]
    module.pairs[0] = [(mine, f"{theirs} in an art museum") for mine, theirs in module.pairs[0]]
    assert sorted(tokenizer.convert_ids_to_tokens(module.own_tokens(module.pipeline.texts[0]))) == [
        "pixel</w>",
        "surfing</w>",
    ]


def test_the_text_encoder_takes_part_where_it_learns(ablation: Ablation, fit: Fit) -> None:
    module = begun(ablation(edited_parameters="embedding", prior_weight=0.2), fit)
    batch, options = torch.tensor([0, 3]), {"objective": "model", "prior_weight": 0.2}
    constant = copy.deepcopy(module.unet)
    (ours,) = gradients(module, module.training_step(batch, 1)).values()
    text_encoder = copy.deepcopy(module.text_encoder)

    def teacher(noisy: Tensor, timesteps: Tensor, states: Tensor) -> Any:
        return constant(noisy, timesteps, states.detach())

    expected = plain_loss(module, batch, module.unet, text_encoder, teacher, **options)
    (row,) = module.own_tokens(module.pipeline.texts[0])
    (theirs,) = torch.autograd.grad(expected, text_encoder.get_parameter(EMBEDDING.removeprefix("text_encoder.")))
    assert_close(ours[row], theirs[row], rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    assert ours[row].abs().max() > 0
    ours[row] = 0
    assert not ours.any()


def test_two_concepts_are_ablated_together(ablation: Ablation, fit: Fit) -> None:
    module = ablation(concept=["dog", "cat"], edited_parameters="embedding")
    module.configure_model()
    before = weights(module)[EMBEDDING]
    fit(module, batch_size=8, steps=2)
    moved = (before != weights(module)[EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
    assert set(module.pipeline.tokenizer.convert_ids_to_tokens(moved)) == {"dog</w>", "cat</w>"}
    assert module.report["anchors"] == {"pictures": 8, "made": 8}


@pytest.mark.parametrize("code", ["diffusers", "CompVis"])
def test_the_gradient_is_that_of_the_authors_codes_divided_by_the_channels(code: str) -> None:
    """Their ablation term is a sum over channels, divided by the mask's; the regulariser is a mean in one code only."""
    generator = torch.Generator().manual_seed(0)
    channels, mask = 4, torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[:, :, :3] = True
    found = [torch.randn(2, channels, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    wished = [torch.randn(2, channels, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    full = torch.ones_like(mask)

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        inputs = [tensor.clone().requires_grad_() for tensor in found]
        return torch.cat(torch.autograd.grad(loss(*inputs), inputs))

    def theirs(ablated: Tensor, anchored: Tensor) -> Tensor:
        error = ((ablated - wished[0]).square() * mask).sum() / mask.sum()
        apart = (anchored - wished[1]).square()
        return error + (1.0 * apart.mean() if code == "diffusers" else 0.2 * apart.sum() / full.sum())

    def ours(prior_weight: float) -> Tensor:
        return gradients(
            lambda ablated, anchored: (
                masked_error(ablated, wished[0], mask) + prior_weight * masked_error(anchored, wished[1], full)
            )
        )

    expected = gradients(theirs)
    assert_close(channels * ours(1 / channels if code == "diffusers" else 0.2), expected, rtol=1e-5, atol=1e-7)
    assert torch.cosine_similarity(ours(1.0).flatten(), expected.flatten(), dim=0) < 0.95
