from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from helpers import Interrupted, changed, frozen, hook, interrupt, started, weights
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.parameters import GROUPS, match_parameters
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import add_noise
from lit_unlearn.diffusion.vocabulary import vocabulary_of
from lit_unlearn.methods.forget_me_not import ForgetMeNot

Build = Callable[..., ForgetMeNot]
Fit = Callable[..., L.Trainer]


@pytest.fixture
def build(tiny_sd: Path, pets: str, tmp_path: Path) -> Build:
    """Makes a ``ForgetMeNot`` that turns ``tiny_sd`` from the dog; takes the arguments that shall differ."""

    def make(kind: type[ForgetMeNot] = ForgetMeNot, **arguments: Any) -> ForgetMeNot:
        defaults = {
            "concept": "dog",
            "model": str(tiny_sd),
            "concept_set": pets,
            "num_inference_steps": 1,
            "num_images": 2,
            "image_cache": str(tmp_path / "references"),
            "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        }
        return kind(**{**defaults, **arguments})

    return make


@pytest.fixture
def fit(fit: Fit) -> Fit:
    """Fits it in batches of one, and returns the trainer."""
    return partial(fit, batch_size=1)


def prepared(module: ForgetMeNot) -> ForgetMeNot:
    """``module`` with its pipeline loaded and its prompts tokenized."""
    module.configure_model()
    module.prepare_prompts()
    return module


def marked(module: ForgetMeNot) -> list[list[str]]:
    """The marked tokens of each prompt but the last of them, the end of the text."""
    tokenizer = module.pipeline.tokenizer
    rows = zip(module.prompts.ids[0].tolist(), module.mask.tolist(), strict=True)
    words = [[tokenizer.convert_ids_to_tokens(i) for i, m in zip(*row, strict=True) if m] for row in rows]
    assert all(row[-1] == "<|endoftext|>" for row in words) or not module.include_eot
    return [[word.removesuffix("</w>") for word in row if word != "<|endoftext|>"] for row in words]


# --- the loss


def plain_loss(
    module: ForgetMeNot, prompt: str, positions: list[int], noisy: Tensor, timesteps: Tensor, form: str
) -> Tensor:
    """The loss of one item by queries and keys of the unchanged UNet, head by head and token by token."""
    unet, components = module.unet, module.pipeline
    layers = {name: m for name, m in unet.named_modules() if name.endswith("attn2")}
    projections = {(name, p): getattr(m, p) for name, m in layers.items() for p in ("to_q", "to_k")}
    with capture_inputs(projections) as captured, torch.no_grad():  # type: ignore[arg-type]
        unet(noisy, timesteps, encode_prompts(components.tokenizer, components.text_encoder, [prompt]))
    numbers = []
    for name, attn in layers.items():
        query, key = (projections[name, p](captured[name, p])[0] for p in ("to_q", "to_k"))  # type: ignore[index]
        width = query.shape[1] // attn.heads
        for head in range(attn.heads):
            columns = slice(head * width, (head + 1) * width)
            attention = (query[:, columns] @ key[:, columns].T * width**-0.5).softmax(-1)
            numbers += [attention[:, place] for place in positions]
    together = torch.cat(numbers)
    return together.norm() if form == "norm" else together.square().sum()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize("form", ["norm", "sum_of_squares"])
def test_the_loss_equals_a_plain_loop(
    model: str, form: Any, build: Build, fit: Fit, request: pytest.FixtureRequest
) -> None:
    module = started(build(model=str(request.getfixturevalue(model)), form=form, templates=["a photo of the {}"]), fit)
    batch = torch.tensor([0])
    (generator,) = module.generators(batch, 0)
    timestep = torch.randint(1000, (), generator=generator).view(1)
    image = module.latents[0][int(torch.randint(2, (), generator=generator))].unsqueeze(0)
    noise = torch.randn(image.shape[1:], generator=generator).unsqueeze(0)
    noisy = add_noise(module.pipeline.scheduler, image, noise, timestep)
    # "a photo of the dog" falls into a, p, ho, to, of, the, dog: the dog is token 7, its end 8.
    expected = plain_loss(module, "a photo of the dog", [7, 8], noisy, timestep, form)
    with torch.no_grad():
        loss = module.training_step(batch, 0)
    assert_close(loss, expected, rtol=1e-5, atol=0)  # float32 sums in another order


def test_a_batch_of_different_prompts_is_the_mean_of_its_items(build: Build, fit: Fit) -> None:
    module = started(build(templates=["a {}", "the {} and a {} at sunset"]), fit)
    assert module.mask.sum(-1).tolist() == [2, 3]
    with torch.no_grad():
        single = [module.training_step(torch.tensor([item]), 0) for item in (0, 1, 2)]
        batch = module.training_step(torch.tensor([0, 1, 2]), 0)
    assert_close(batch, torch.stack(single).mean(), rtol=1e-5, atol=0)
    assert len({round(float(loss), 4) for loss in single}) == 3


@pytest.mark.parametrize(("edited", "encoded"), [("full", [1, 1]), (r"text_encoder\..*fc2\.weight", [1, 1, 1, 1])])
def test_a_prompt_is_encoded_once_unless_its_encoder_is_trained(
    edited: str, encoded: list[int], build: Build, fit: Fit
) -> None:
    module = started(build(templates=["a {}", "the {} at sunset"], edited_parameters=edited), fit)
    found: list[int] = []
    text_encoder = module.pipeline.texts[0].model
    text_encoder.register_forward_pre_hook(
        lambda _, args, kw: found.append(len(args[0] if args else kw["input_ids"])), with_kwargs=True
    )
    for step in range(2):
        for item in (0, 1):
            module.training_step(torch.tensor([item]), step)
    assert found == encoded


def test_descent_turns_attention_away_from_the_concept(build: Build, fit: Fit) -> None:
    class SameImage(ForgetMeNot):
        """Looks at the same noised image in every step, so that the loss is a function of the weights alone."""

        def noisy_images(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
            return super().noisy_images(batch % self.num_pairs, 0)

    losses: list[float] = []
    shares: list[float] = []

    def record(trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        losses.append(float(outputs["loss"]))
        shares.append(float(trainer.callback_metrics["train/attention"]))

    module = build(SameImage)
    fit(module, hook("on_train_batch_end", record), steps=12)
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < shares[-1] < 0.7 * shares[0] < 1


# --- what moves


@pytest.mark.parametrize("group", ["full", "xattn", r"attn2\.to_k", r"text_encoder.*fc2"])
def test_only_the_group_moves_and_the_reference_stays(group: str, build: Build, fit: Fit) -> None:
    module = build(edited_parameters=group)
    seen: dict[str, Any] = {}

    def at_start(*_: Any) -> None:
        seen["weights"], seen["unet"] = weights(module), copy.deepcopy(module.unet)

    def gradients(*_: Any) -> None:
        seen["grad"] = [n for n, p in module.pipeline.named_parameters().items() if p.grad is not None]

    fit(module, hook("on_train_start", at_start), hook("on_after_backward", gradients), steps=2)
    selected = match_parameters(GROUPS.get(group, group), seen["weights"])
    moved = changed(seen["weights"], weights(module))
    assert set(moved) <= set(seen["grad"]) <= set(selected)
    # What comes after the last attention has no part in it; all else of the group moves, but for a key's zero gradient.
    after = [n for n in selected if n not in seen["grad"]]
    assert all(n.startswith(("unet.up_blocks", "unet.conv_")) for n in after)
    assert len(moved) > 0.6 * len(selected) > 0
    module.unet.zero_grad()
    generator = torch.Generator().manual_seed(5)
    latents, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 32, 32, generator=generator)
    with torch.no_grad():
        before = frozen(module, latents, torch.tensor([500]), states)
        assert torch.equal(before, seen["unet"](latents, torch.tensor([500]), states).sample)
        if not group.startswith("text"):
            assert not torch.equal(before, module.unet(latents, torch.tensor([500]), states).sample)


def test_weights_that_attention_does_not_depend_on(build: Build) -> None:
    with pytest.raises(ValueError, match=r"edited_parameters='conv_in' selects vae.* choose weights of the UNet"):
        build(edited_parameters="conv_in")


def test_weights_behind_the_last_attention(build: Build, fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"edited_parameters='unet.conv_out' selects only weights after the last"):
        fit(build(edited_parameters="unet.conv_out"))


# --- the concept's tokens


def test_end_of_text_by_padding(build: Build, tiny_sd2: Path) -> None:
    def counts(**arguments: Any) -> list[int]:
        return prepared(build(templates=["a {}", "the red {}"], **arguments)).mask.sum(-1).tolist()

    # "a dog" has 2 tokens of 32, "the red dog" 3: one for the beginning, and the rest end or padding.
    assert counts(include_eot=False) == [1, 1]
    assert counts() == [2, 2]
    assert counts(padding="all_eot") == [1 + 29, 1 + 28]
    assert counts(padding="all_eot", model=str(tiny_sd2)) == counts(model=str(tiny_sd2)) == [2, 2]


def test_prompts_of_the_concept_set(build: Build) -> None:
    module = prepared(build(concept_set="emoji20", prompts="edit_prompts", concept="soccer ball"))
    assert module.num_pairs == 15
    words = dict(zip(module.edit_prompts, marked(module), strict=True))
    named = {prompt for prompt in words if module.edited[0].find_name(prompt)}
    assert 0 < len(named) < 15
    for prompt, tokens in words.items():
        if prompt in named:
            assert tokens in (["soccer", "ball"], ["soccer"], ["football"]), prompt
        else:  # what differs from the target prompt is a part of the prompt, and not all of it
            assert " ".join(tokens) in prompt
            assert 0 < len(tokens) < len(prompt.split()), prompt


def test_a_prompt_whose_target_only_adds_words(build: Build, tmp_path: Path, pets: str) -> None:
    content = Path(pets).read_text(encoding="utf-8")
    assert content.count("the dog at sunset") == 1
    path = tmp_path / "pets.yaml"
    path.write_text(
        content.replace("the dog at sunset", "the pet at sunset").replace(
            "the soccer ball at sunset", "the pet at sunset again"
        ),
        encoding="utf-8",
    )
    module = prepared(build(concept_set=str(path), prompts="edit_prompts"))
    assert marked(module) == [["dog"], ["the", "pet", "at", "sunset"]]


def test_templates_by_kind(build: Build) -> None:
    assert build(concept_set="emoji20", concept=["soccer ball", "sketch"]).edit_prompts == [
        "a photo of soccer ball",
        "a photo of soccer",
        "a photo of football",
        "a photo in the style of sketch",
    ]


# --- reference images


def test_each_concept_is_seen_on_its_own_images(build: Build, fit: Fit) -> None:
    module = started(build(concept=["dog", "cat"], prompts="edit_prompts", num_images=3), fit)
    assert module.owners == [0, 0, 1, 1]
    assert [len(latents) for latents in module.latents] == [3, 3]
    assert marked(module) == [["dog"], ["dog"], ["cat"], ["cat"]]
    # Without noise (t = 0) an item shows one of the images of its own concept.
    alphas = module.pipeline.scheduler.alphas_cumprod
    module.pipeline.scheduler.alphas_cumprod = torch.ones_like(alphas)
    noisy, _ = module.noisy_images(torch.arange(40), 0)
    for item in range(40):
        own, other = (module.latents[n] for n in (module.owners[item % 4], 1 - module.owners[item % 4]))
        assert any(torch.equal(noisy[item], image) for image in own)
        assert not any(torch.equal(noisy[item], image) for image in other)
    assert {int(module.noisy_images(torch.tensor([i]), 0)[1]) > 500 for i in range(40)} == {True, False}


# --- learned tokens


def write_tokens(path: Path, model: Path, concept: str = "dog", width: int = 32) -> Path:
    embeddings = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    vocabulary, _ = vocabulary_of(str(model))
    save_file({"embeddings": embeddings}, path, {"concept": concept, "vocabulary": vocabulary})
    return path


def test_learned_tokens_stand_for_the_concept(build: Build, fit: Fit, tiny_sd: Path, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.safetensors", tiny_sd)
    module = started(build(embeddings=str(path), templates=["a picture of {}"]), fit)
    # Beginning, a, picture, of, three new tokens, end.
    assert module.mask.nonzero()[:, 1].tolist() == [4, 5, 6, 7]
    assert module.texts(0) == ["a picture of dog"]  # what images are drawn from
    told, predict = [], module.pipeline.predict
    module.pipeline.predict = lambda x, t, condition: told.append(condition) or predict(x, t, condition)
    module.training_step(torch.tensor([0]), 0)
    del module.pipeline.predict
    (states,) = (condition.states for condition in told)
    plain = encode_prompts(module.pipeline.tokenizer, module.text_encoder, ["a picture of dog"])
    assert torch.equal(states[:, :4], plain[:, :4])
    assert not torch.isclose(states[:, 4:], plain[:, 4:]).all(-1).any()
    before = weights(module)
    fit(module, steps=2)
    assert set(changed(before, weights(module))) <= set(module.edited_names)


@pytest.mark.parametrize(
    ("tokens", "arguments", "problem"),
    [
        ({"concept": "cat"}, {}, "was learned for cat, but concept=dog: learn tokens for the concept and edit it"),
        ({}, {"concept": ["dog", "cat"]}, "was learned for dog, but concept=dog, cat: learn"),
        ({}, {"model": "tiny_sd2"}, "was learned for another text encoder than that of model='.*tiny-sd2'"),
        ({"width": 8}, {}, "was learned for another text encoder"),
        ({}, {"prompts": "edit_prompts"}, "model.embeddings has no effect with prompts=edit_prompts"),
    ],
)
def test_learned_tokens_that_do_not_fit(
    tokens: dict[str, Any],
    arguments: dict[str, Any],
    problem: str,
    build: Build,
    tiny_sd: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if "model" in arguments:
        arguments = {"model": str(request.getfixturevalue(arguments["model"]))}
    path = write_tokens(tmp_path / "tokens.safetensors", tiny_sd, **tokens)
    with pytest.raises(ValueError, match=problem):
        build(embeddings=str(path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"templates": []}, r"model.templates=\[\] must be prompts with {}"),
        ({"templates": ["a photo of {}", "a dog"]}, r"'a dog'\] must be prompts with {} where the concept stands"),
        ({"templates": ["a {}"], "prompts": "edit_prompts"}, "model.templates has no effect with prompts=edit_prompts"),
        ({"padding": "all_eot", "include_eot": False}, "model.padding='all_eot' has no effect with include_eot=false"),
        ({"embeddings": "nowhere.safetensors"}, "embeddings=nowhere.safetensors does not exist"),
        ({"num_images": 0}, "model.num_images=0 must be at least 1"),
        ({"edited_parameters": "attn3"}, "edited_parameters='attn3' selects no parameter"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], problem: str, build: Build) -> None:
    with pytest.raises(ValueError, match=problem):
        build(**arguments)


# --- runs


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "emoji-sd"])
def test_two_steps_on(model: str, build: Build, fit: Fit, request: pytest.FixtureRequest) -> None:
    name = model if model == "emoji-sd" else str(request.getfixturevalue(model))
    module = build(model=name, num_images=1, edited_parameters="xattn")
    fit(module, steps=2, batch_size=2)
    assert 1e-6 < module.report["weight_change_ratio"] < 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("every_n_train_steps", [None, 1], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    every_n_train_steps: int | None, build: Build, fit: Fit, tmp_path: Path
) -> None:
    make = partial(build, templates=["a {}", "the {}", "one {}"])
    whole, first, resumed = make(), make(), make()
    fit(whole, max_epochs=2, steps=3)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True, every_n_train_steps=every_n_train_steps)
    with pytest.raises(Interrupted):
        fit(first, interrupt("on_train_batch_end", step=5), keep(), max_epochs=2, steps=3)
    last = tmp_path / "saved/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == (3 if every_n_train_steps is None else 4)
    fit(resumed, keep(), max_epochs=2, steps=3, ckpt_path=last)
    assert changed(weights(whole), weights(resumed)) == []
    assert resumed.report == whole.report
    assert whole.report["weight_change_ratio"] > 1e-4
