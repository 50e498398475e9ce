from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close

from helpers import Interrupted, changed, hook, interrupt, load_copy, weights
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.diffusion.new_tokens import initial_embeddings
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.methods import textual_inversion
from lit_unlearn.methods.textual_inversion import TextualInversion, inversion_loss, optimise_embeddings, pull_norm

Build = Callable[..., TextualInversion]
Fit = Callable[..., L.Trainer]


@pytest.fixture
def build(tiny_sd: Path, pets: str, tmp_path: Path) -> Build:
    """Makes a ``TextualInversion`` of the dog of ``tiny_sd``; takes the arguments that shall differ."""

    def make(**arguments: Any) -> TextualInversion:
        defaults = {
            "concept": "dog",
            "model": str(tiny_sd),
            "concept_set": pets,
            "num_inference_steps": 1,
            "num_images": 2,
            "num_tokens": 2,
            "image_cache": str(tmp_path / "references"),
            "optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        }
        return TextualInversion(**{**defaults, **arguments})

    return make


@pytest.fixture
def fit(fit: Fit) -> Fit:
    """Fits it for three steps in batches of two, and returns the trainer."""
    return partial(fit, steps=3, batch_size=2)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_only_the_new_embeddings_learn(model: str, build: Build, fit: Fit, request: pytest.FixtureRequest) -> None:
    module = build(model=str(request.getfixturevalue(model)))
    seen: dict[str, Any] = {}

    def at_start(*_: Any) -> None:
        seen["weights"], seen["embeddings"] = weights(module), module.embeddings.detach().clone()

    def gradients(*_: Any) -> None:
        seen["gradients"] = [name for name, parameter in module.named_parameters() if parameter.grad is not None]

    fit(module, hook("on_train_start", at_start), hook("on_after_backward", gradients))
    assert seen["gradients"] == ["embeddings"]
    assert changed(seen["weights"], weights(module)) == []
    moved = (module.embeddings - seen["embeddings"]).norm(dim=1) / seen["embeddings"].norm(dim=1)
    assert (moved > 1e-3).all()


def test_the_loss_falls(build: Build, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    same = textual_inversion.seeded

    # The same image, noise and timestep in every step: the loss is a function of the embeddings alone.
    monkeypatch.setattr("lit_unlearn.methods.shared.gradient.seeded", lambda seed, epoch, step, item: same(seed, item))
    losses: list[float] = []
    record = hook("on_train_batch_end", lambda trainer, module, outputs, *_: losses.append(float(outputs["loss"])))
    fit(build(optimizer=partial(torch.optim.AdamW, lr=0.1)), record, steps=15)
    assert len(losses) == 15
    assert losses[-1] < losses[0] - 0.05
    assert min(losses) == pytest.approx(losses[-1], rel=0.05)


def test_the_plain_loop_does_what_the_run_does(build: Build, fit: Fit, tiny_sd: Path) -> None:
    module = build(templates=["a {}"], optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))
    losses: list[float] = []
    fit(module, hook("on_train_batch_end", lambda t, m, outputs, *_: losses.append(float(outputs["loss"]))), steps=4)
    components = load_copy(str(tiny_sd))
    start = initial_embeddings(
        components.tokenizer, components.text_encoder, 2, None, textual_inversion.seeded(0, "embeddings")
    )
    learned, loop_losses = optimise_embeddings(
        components, start, ["a {}"], module.latents, steps=4, learning_rate=1e-2, batch_size=2
    )
    assert torch.equal(learned, module.embeddings)
    assert loop_losses == losses
    assert not torch.isclose(learned, start).any()
    assert all(parameter.grad is None for parameter in components.named_parameters().values())


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_the_loss_is_the_diffusion_loss_of_the_filled_prompt(model: str, request: pytest.FixtureRequest) -> None:
    components = load_copy(str(request.getfixturevalue(model)))
    tokenizer, scheduler = components.tokenizer, components.scheduler
    words = initial_embeddings(tokenizer, components.text_encoder, 2, "soccer ball", torch.Generator())
    prompts = components.tokenize_templates(["a {}"], 2)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = inversion_loss(components, words, prompts, latents, [torch.Generator().manual_seed(7)])
    generator = torch.Generator().manual_seed(7)
    timestep = torch.randint(1000, (), generator=generator)
    clean = latents[int(torch.randint(3, (), generator=generator))]
    noise = torch.randn(clean.shape, generator=generator)
    alpha, sigma = scheduler.alphas_cumprod[timestep].sqrt(), (1 - scheduler.alphas_cumprod[timestep]).sqrt()
    states = encode_prompts(tokenizer, components.text_encoder, ["a soccer ball"])
    with torch.no_grad():
        output = components.unet((alpha * clean + sigma * noise)[None], timestep[None], states).sample[0]
    target = noise if model == "tiny_sd" else alpha * noise - sigma * clean  # SD 2.x predicts the velocity
    assert_close(loss, (output - target).square().mean(), rtol=1e-5, atol=0)


def test_norms_go_a_share_of_their_way() -> None:
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]])
    pull_norm(embeddings, norm=1.0, rate=0.1)
    # 5 goes to 4.6 and 0.5 to 0.55; directions stay, and nothing has none.
    assert_close(embeddings, torch.tensor([[2.76, 3.68], [0.0, 0.55], [0.0, 0.0]]))
    pull_norm(embeddings, norm=1.0, rate=1.0)
    assert_close(embeddings.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def test_pictures_are_drawn_with_the_new_tokens(build: Build) -> None:
    module = build(initial_words="soccer ball")
    module.configure_model()
    prompts, seeds = ["a dog at sunset", "a cat"], [3, 4]
    pictures = module.generate(prompts, seeds)
    module.reads_new_tokens = False
    assert torch.equal(pictures, module.generate(["a soccer ball at sunset", "a cat"], seeds))
    module.reads_new_tokens = True
    # The unedited model reads the word.
    with module.pretrained.restored():
        unedited = module.generate(prompts, seeds)
    assert torch.equal(unedited[1], pictures[1])
    assert not torch.equal(unedited[0], pictures[0])
    assert torch.equal(module.generate(prompts, seeds), pictures)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"concept": ["dog", "cat"]}, "concept=dog, cat: new tokens are for one concept, so name one"),
        ({"num_tokens": 0}, "model.num_tokens=0 must be at least 1"),
        ({"norm_decay": 1.5}, "model.norm_decay=1.5 must be between 0 and 1"),
        ({"initial_words": " "}, "model.initial_words is empty"),
        ({"templates": ["a dog"]}, r"model.templates=\['a dog'\] must be prompts with {}"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], problem: str, build: Build) -> None:
    with pytest.raises(ValueError, match=problem):
        build(**arguments)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(build: Build, fit: Fit, tmp_path: Path) -> None:
    whole, first, resumed = build(), build(), build()
    fit(whole, max_epochs=2)
    keep = partial(ModelCheckpoint, tmp_path / "saved", save_last=True)
    with pytest.raises(Interrupted):
        fit(first, interrupt("on_train_batch_end", step=5), keep(), max_epochs=2)
    last = tmp_path / "saved/last.ckpt"
    assert set(torch.load(last, weights_only=True)["state_dict"]) == {"embeddings"}
    fit(resumed, keep(), max_epochs=2, ckpt_path=last)
    assert torch.equal(whole.embeddings, resumed.embeddings)
    assert not torch.isclose(first.embeddings, whole.embeddings).all()


def test_what_callbacks_save_after_a_step_has_norms_that_were_pulled(build: Build, fit: Fit) -> None:
    module, norms = build(norm_decay=1.0), []
    # Lightning calls callbacks, which save checkpoints, before the module at the end of a step.
    fit(module, hook("on_train_batch_end", lambda t, m, *_: norms.append(m.embeddings.detach().norm(dim=1))))
    assert len(norms) == 3
    for norm in norms:
        assert norm.tolist() == pytest.approx(module.vocabulary_norms * len(norm), rel=1e-5)


def test_a_checkpoint_of_another_text_encoder_is_refused(
    build: Build, fit: Fit, trainer_with: Fit, tiny_sd2: Path, pets: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    fit(build()).save_checkpoint(path)
    with pytest.raises(ValueError, match=r"learned for another text encoder than that of model='.*tiny-sd2'"):
        trainer_with().predict(build(model=str(tiny_sd2)), ConceptPrompts("dog", pets), ckpt_path=str(path))
