"""Textual inversion (Gal et al., 2023): learns new tokens for a concept from images of it.

Forget-Me-Not uses it for a concept without a word, and an attack uses it to find out if an edited model can still draw
a concept. In a model with several text encoders a token is new in each of them, and its embeddings are learned together
(as diffusers does for Stable Diffusion XL; here in a T5 too), with the loss of the model's own training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_unlearn.diffusion.new_tokens import (
    PLACE,
)
from lit_unlearn.diffusion.parameters import PretrainedValues
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import (
    seeded,
)
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.diffusion.vocabulary import vocabulary_of
from lit_unlearn.methods.forget_me_not import check_templates, templates_of
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.reference_images import ReferenceImages
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.system.names import check_numbers
from lit_unlearn.system.pixels import to_uint8


def inversion_loss(
    pipeline: Pipeline,
    embeddings: Tensor,
    prompts: Tokens,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Error of the denoiser's prediction on noised images with prompts that hold the new tokens, a scalar (Eq. 2).

    Args:
        pipeline: Any pipeline, edited or not.
        embeddings: Embeddings of the new tokens, (n, D); gradients flow into them.
        prompts: The batch's prompts, from ``Pipeline.tokenize_templates``.
        latents: Images of the concept, (num, C, H, W).
        generators: For each item, the generator of its image, timestep and noise.
    """
    clean, noise, timesteps = [], [], []
    for generator in generators:
        timesteps.append(pipeline.noise.draw_timestep(generator))
        clean.append(latents[int(torch.randint(len(latents), (), generator=generator))])
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    images, steps = torch.stack(clean), torch.stack(timesteps).to(latents.device)
    noises = torch.stack(noise).to(images)
    condition = pipeline.encode(prompts, embeddings)
    prediction = pipeline.predict(pipeline.noise.add(images, noises, steps), steps, condition)
    return F.mse_loss(prediction.float(), pipeline.noise.target(images, noises, steps).float())


@torch.no_grad()
def pull_norm(embeddings: Tensor, norm: float, rate: float) -> None:
    """Move the norm of each of ``embeddings`` (n, D) towards ``norm`` by the fraction ``rate`` of the gap, in place."""
    norms = embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)
    embeddings.mul_(1 + rate * (norm / norms - 1))


def pull_norms(pipeline: Pipeline, embeddings: Tensor, norms: Sequence[float], rate: float) -> None:
    """``pull_norm`` for the part of each text encoder of ``pipeline`` in ``embeddings`` (n, D), to its own norm."""
    for part, norm in zip(embeddings.detach().split(pipeline.token_widths, dim=1), norms, strict=True):
        pull_norm(part, norm, rate)


def optimise_embeddings(
    pipeline: Pipeline,
    embeddings: Tensor,
    templates: Sequence[str],
    latents: Tensor,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 1,
    norm_decay: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """Textual inversion on any pipeline, without a trainer; an attack calls it on an edited one.

    Args:
        pipeline: The pipeline; its weights do not change.
        embeddings: Initial embeddings of the new tokens, (n, D), from ``Pipeline.initial_embeddings``.
        templates: Prompts with ``{}`` in place of the new tokens.
        latents: Images of the concept, (num, C, H, W).
        steps: Optimizer steps (AdamW without weight decay).
        learning_rate: Learning rate of the embeddings.
        batch_size: Images in a step; prompts take turns.
        norm_decay: ``rate`` of ``pull_norm``; 0 does not change the norms.
        seed: Seed of images, timesteps and noise.

    Returns:
        The learned embeddings (n, D), and the loss of each step.
    """
    learned = nn.Parameter(embeddings.detach().float().clone())
    optimizer = torch.optim.AdamW([learned], lr=learning_rate, weight_decay=0.0)
    prompts = pipeline.tokenize_templates(templates, len(embeddings))
    norms = pipeline.vocabulary_norms
    losses = []
    for step in range(steps):
        items = [slot * len(templates) + (step * batch_size + slot) % len(templates) for slot in range(batch_size)]
        rows = torch.tensor(items) % len(templates)
        generators = [seeded(seed, 0, step, item) for item in items]
        loss = inversion_loss(pipeline, learned, prompts[rows], latents, generators)
        (learned.grad,) = torch.autograd.grad(loss, [learned])
        optimizer.step()
        pull_norms(pipeline, learned, norms, norm_decay)
        losses.append(float(loss.detach()))
    return learned.detach(), losses


class WithoutNewTokens(PretrainedValues):
    """The unedited state of a module that does not change weights: prompts keep the concept's names."""

    def __init__(self, module: TextualInversion) -> None:
        super().__init__({})
        self.module = module

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Keep the concept's names in the prompts within the block."""
        before, self.module.reads_new_tokens = self.module.reads_new_tokens, False
        try:
            yield
        finally:
            self.module.reads_new_tokens = before

    def change_ratio(self) -> float:
        """Zero, since weights do not change."""
        return 0.0


class TextualInversion(GradientEditor, ReferenceImages):
    """Learns embeddings of new tokens for one concept; the weights of the pipeline do not change.

    A ``test`` or a grid shows pictures of the prompts as they are, next to pictures of the same prompts with the new
    tokens instead of the concept's names.

    Args:
        num_tokens: Number of tokens for the concept.
        initial_words: Words whose tokens the embeddings start from, in turn; null starts from noise with the statistics
            of the vocabulary's embeddings.
        templates: Prompts with ``{}`` for the tokens; null takes "a photo of {}", for styles "a photo in the style of
            {}".
        norm_decay: After each step, the norm of each embedding moves by this fraction of the gap towards the mean norm
            of the vocabulary's embeddings; 0 does not change the norm.
        optimizer: Optimizer of the embeddings.
        edited_parameters: Leave it at null, since weights are not edited.
        **kwargs: See ``GradientEditor`` and ``ReferenceImages``; ``seed`` is also the seed of the initial noise.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    changes_weights = False
    num_pairs: int

    def __init__(
        self,
        num_tokens: int = 4,
        initial_words: str | None = None,
        templates: list[str] | None = None,
        norm_decay: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        edited_parameters: Literal["none"] = "none",
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, optimizer=optimizer, **kwargs)  # type: ignore[arg-type]
        check_numbers("model", num_tokens=num_tokens)
        if not 0 <= norm_decay <= 1:
            raise ValueError(f"model.norm_decay={norm_decay} must be between 0 and 1.")
        if initial_words is not None and not initial_words.strip():
            raise ValueError("model.initial_words is empty: give words to start from, or null to start from noise.")
        if len(self.edited) > 1:
            raise ValueError(f"concept={', '.join(self.edited_labels)}: new tokens are for one concept, so name one.")
        check_templates(templates)
        (self.concept,) = self.edited
        self.templates = templates_of(self.concept, templates)
        self.num_pairs = len(self.templates)
        self.num_tokens, self.initial_words, self.norm_decay = num_tokens, initial_words, norm_decay
        self.vocabulary, _ = vocabulary_of(self.model_id, self.base.config_folder)
        self.reads_new_tokens = True

    def select(self, names: Sequence[str]) -> list[str]:
        """Nothing, since weights are not edited."""
        return []

    # --- set-up and checkpoints

    def configure_model(self) -> None:
        """Load the pipeline, frozen, and make the embeddings."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        self.pretrained = WithoutNewTokens(self)
        generator = seeded(self.seed, "embeddings")
        self.embeddings = nn.Parameter(self.pipeline.initial_embeddings(self.num_tokens, self.initial_words, generator))
        self.vocabulary_norms = self.pipeline.vocabulary_norms
        self.prompts = self.pipeline.tokenize_templates(self.templates, self.num_tokens)

    def own_state(self) -> list[str]:
        """The embeddings."""
        return ["embeddings"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store which concept and text encoder the embeddings belong to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["vocabulary"] = self.vocabulary

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Do the checks of the base class, and refuse embeddings of another text encoder.

        Raises:
            ValueError: The checkpoint does not match; the message says what differs.
        """
        super().on_load_checkpoint(checkpoint)
        if checkpoint[CHECKPOINT_KEY].get("vocabulary") != self.vocabulary:
            raise ValueError(
                f"The checkpoint's embeddings were learned for another text encoder than that of model="
                f"{self.model_id!r}: use the model that they were learned on."
            )

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the embeddings only."""
        return self.optimizer([self.embeddings])

    # --- fit

    def on_fit_start(self) -> None:
        """Read the reference images, or draw them from the concept's edit prompts if no folder is given."""
        super().on_fit_start()
        (self.latents,) = self.reference_latents([self.concept.edit_prompts])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The diffusion loss with the new tokens in the prompt.

        Args:
            batch: Numbers of templates, as in ``ConceptPrompts``, (B,).
            batch_idx: Number of the step within the epoch.
        """
        rows = batch.cpu() % self.num_pairs
        generators = self.generators(batch, batch_idx)
        loss = inversion_loss(self.pipeline, self.embeddings, self.prompts[rows], self.latents, generators)
        self.log_losses({"train/loss": loss}, batch)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and keep the norms near those of the vocabulary, before a checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        pull_norms(self.pipeline, self.embeddings, self.vocabulary_norms, self.norm_decay)

    # --- pictures

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W), uint8 on the CPU, of ``prompts`` with new tokens instead of the concept's names."""
        if not self.reads_new_tokens:
            return super().generate(prompts, seeds)
        templates = [self.concept.replace_names(prompt, PLACE) for prompt in prompts]
        pipeline = self.pipeline
        condition = pipeline.encode(pipeline.tokenize_templates(templates, self.num_tokens), self.embeddings)
        return to_uint8(
            pipeline.decode(pipeline.draw_latents(condition, seeds, self.num_inference_steps, self.guidance_scale))
        )
