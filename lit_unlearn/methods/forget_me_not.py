"""Forget-Me-Not (Zhang et al., 2023): attention resteering on reference images of the concept.

It is for denoisers with cross-attention, whose softmax is over the prompt's tokens alone: UNets. The two text encoders
of Stable Diffusion XL read a prompt at the same positions. In the joint attention of a transformer the picture's own
patches compete with the tokens, so that the loss would be another one, and such models are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_unlearn.core.alignment import positions_mask
from lit_unlearn.core.attention_resteering import ResteeringForm, attention_resteering_loss, attention_share
from lit_unlearn.data.concepts import Concept
from lit_unlearn.diffusion.attention import record_attention
from lit_unlearn.diffusion.concept_tokens import Padding, difference_mask, eot_mask
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.new_tokens import (
    PLACE,
    read_embeddings,
)
from lit_unlearn.diffusion.vocabulary import vocabulary_of
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.reference_images import ReferenceImages


def check_templates(templates: Sequence[str] | None) -> None:
    """Refuse templates without a place for the concept.

    Raises:
        ValueError: The list is empty, or a template does not contain ``{}``.
    """
    if templates is not None and (not templates or not all(PLACE in template for template in templates)):
        raise ValueError(f"model.templates={templates} must be prompts with {PLACE} where the concept stands.")


def templates_of(concept: Concept, templates: Sequence[str] | None) -> list[str]:
    """Return ``templates``, or if None those of the reference code, which depend on the kind of the concept."""
    if templates is not None:
        return list(templates)
    return ["a photo in the style of {}" if concept.kind == "style" else "a photo of {}"]


class ForgetMeNot(GradientEditor, ReferenceImages):
    """Turns the UNet's attention away from the tokens of the concept, on noised images of it.

    Args:
        form: ``norm`` of these attention probabilities (the reference code), or their ``sum_of_squares`` (the paper).
        prompts: ``names``: every name of the concept in every template; ``edit_prompts``: the edit prompts of the
            concept set. If an edit prompt does not name the concept, its concept tokens are those that differ from its
            target prompt.
        templates: Prompts of ``names``, with ``{}`` for the name; null takes "a photo of {}", for styles "a photo in
            the style of {}".
        include_eot: Also turn attention away from the end-of-text token, which has seen the whole prompt.
        padding: Which end-of-text tokens to include: the ``first_eot``, or ``all_eot`` as in the reference code. They
            differ if the tokenizer pads with the end-of-text token (Stable Diffusion 1.x, emoji-sd): ``all_eot`` then
            turns away nearly all of the attention.
        embeddings: File of tokens learned with ``textual_inversion.yaml``, used in the templates instead of names.
        edited_parameters: Group or pattern of weights of the UNet or the text encoder.
        optimizer: Optimizer of the edited weights.
        **kwargs: See ``GradientEditor`` and ``ReferenceImages``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    needs_cross_attention: ClassVar[bool] = True

    num_pairs: int

    def __init__(
        self,
        form: ResteeringForm = "norm",
        prompts: Literal["names", "edit_prompts"] = "names",
        templates: list[str] | None = None,
        include_eot: bool = True,
        padding: Padding = "first_eot",
        embeddings: str | None = None,
        edited_parameters: str = "full",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, optimizer=optimizer, **kwargs)  # type: ignore[arg-type]
        check_templates(templates)
        if prompts == "edit_prompts" and (given := "templates" if templates else "embeddings" if embeddings else None):
            raise ValueError(f"model.{given} has no effect with prompts=edit_prompts: set prompts to names.")
        if padding == "all_eot" and not include_eot:
            raise ValueError("model.padding='all_eot' has no effect with include_eot=false: leave it at first_eot.")
        self.form: ResteeringForm = form
        self.include_eot, self.padding = include_eot, padding
        self.embeddings: Tensor | None = None if embeddings is None else self._read_embeddings(embeddings)
        self.edit_prompts: list[str] = []
        self.owners: list[int] = []  # the concept of each prompt
        for number, concept in enumerate(self.repaired):
            own = list(concept.edit_prompts)
            if prompts == "names":
                names = [PLACE] if embeddings else concept.names
                own = [t.replace(PLACE, name) for t in templates_of(concept, templates) for name in names]
            self.edit_prompts += own
            self.owners += [number] * len(own)
        self.named = prompts == "names"
        self.num_pairs = len(self.edit_prompts)

    def _read_embeddings(self, path: str) -> Tensor:
        """Read the learned embeddings (n, D) of the edited concept.

        Raises:
            ValueError: They belong to another concept or another model, or several concepts are edited.
        """
        embeddings, metadata = read_embeddings(path)
        if self.own_labels != [metadata["concept"]]:
            raise ValueError(
                f"model.embeddings={path} was learned for {metadata['concept']}, but concept="
                f"{', '.join(self.own_labels)}: learn tokens for the concept and edit it alone."
            )
        vocabulary, width = vocabulary_of(self.model_id, self.base.config_folder)
        if vocabulary != metadata["vocabulary"] or width not in (None, embeddings.shape[1]):
            raise ValueError(
                f"model.embeddings={path} was learned for another text encoder than that of model={self.model_id!r}: "
                "learn it for this model."
            )
        return embeddings

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights that the pattern selects.

        Raises:
            ValueError: It selects weights that do not affect the attention.
        """
        why = ", which does not affect the attention: choose weights of the UNet, such as full or xattn."
        return self.select_only(names, lambda name: not name.startswith("vae."), why)

    # --- what a step draws from

    def on_fit_start(self) -> None:
        """Find the concept's tokens in the prompts, and make the reference images with the pretrained weights."""
        super().on_fit_start()
        self.prepare_prompts()
        with self.pretrained.restored():
            self.latents = self.reference_latents([self.texts(number) for number in range(len(self.edited))])

    def prepare_prompts(self) -> None:
        """Tokenize the prompts and mark the concept's tokens: ``prompts`` and ``mask`` (n, L)."""
        pipeline, text = self.pipeline, self.pipeline.texts[0]
        if self.embeddings is not None:
            self.prompts = pipeline.tokenize_templates(self.edit_prompts, len(self.embeddings))
            mask = self.prompts.slots[0] >= 0
        else:
            self.prompts = pipeline.tokenize(self.edit_prompts)
            mask = self.concept_mask(self.prompts.ids[0])
        if self.include_eot:
            mask |= eot_mask(self.prompts.ids[0], text.eos, self.padding, text.begins)
        self.mask = mask.to(self.device)
        self.known: dict[int, Condition] = {}

    def concept_mask(self, input_ids: Tensor) -> Tensor:
        """Tokens of the concept in each prompt, (n, L) bool.

        They are the tokens of its names. In a prompt without a name they are the tokens that differ from the target
        prompt, or all tokens of the prompt if the target only adds words.
        """
        text, owners = self.pipeline.texts[0], torch.tensor(self.owners)
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for number, concept in enumerate(self.edited):
            rows = owners == number
            prompts = [prompt for prompt, owner in zip(self.edit_prompts, self.owners, strict=True) if owner == number]
            mask[rows] = text.names_mask(prompts, concept.occurrences)
        if not self.named:
            targets = text.tokenize([prompt for concept in self.repaired for prompt in concept.target_prompts])
            differs = difference_mask(input_ids, targets, text.eos, text.begins)
            mask = torch.where(mask.any(-1, keepdim=True), mask, differs)
        content = positions_mask(input_ids, text.eos, "content", text.begins)
        return torch.where(mask.any(-1, keepdim=True), mask, content)

    def texts(self, number: int) -> list[str]:
        """Prompts of the edited concept ``number``; if learned tokens are used, prompts with its first name."""
        prompts = [prompt for prompt, owner in zip(self.edit_prompts, self.owners, strict=True) if owner == number]
        return [prompt.replace(PLACE, self.edited[number].names[0]) for prompt in prompts]

    # --- the loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Attention to the concept's tokens, of the UNet on noised reference images with the concept's prompts.

        Args:
            batch: Numbers of prompts, as in ``ConceptPrompts``, (B,).
            batch_idx: Number of the step within the epoch.
        """
        pairs = batch.cpu() % self.num_pairs
        x_t, timesteps = self.noisy_images(batch, batch_idx)
        with record_attention(self.pipeline.denoiser) as attention:
            self.pipeline.predict(x_t, timesteps, self.condition(pairs))
        probabilities, mask = list(attention.values()), self.mask[pairs.to(self.device)]
        loss = attention_resteering_loss(probabilities, mask, self.form)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"edited_parameters={self.edited_parameters!r} selects only weights after the last cross-attention: "
                "choose full, xattn or a pattern of earlier layers."
            )
        share = attention_share([layer.detach() for layer in probabilities], mask)
        self.log_losses({"train/loss": loss, "train/attention": share}, batch)
        return loss

    def condition(self, pairs: Tensor) -> Condition:
        """Condition of the prompts numbered in ``pairs`` (B,); each is encoded once, unless its encoder is trained."""
        if self.trains_text:
            return self.pipeline.encode(self.prompts[pairs], self.embeddings)
        with torch.no_grad():
            for number in set(pairs.tolist()) - set(self.known):
                self.known[number] = self.pipeline.encode(self.prompts[torch.tensor([number])], self.embeddings)
        return Condition.cat([self.known[number] for number in pairs.tolist()])

    def noisy_images(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """x_t (B, C, H, W) of a reference image for each item of ``batch``, and t (B,), uniform over all steps."""
        clean, noise, timesteps = [], [], []
        for item, generator in zip(batch.tolist(), self.generators(batch, batch_idx), strict=True):
            latents = self.latents[self.owners[item % self.num_pairs]]
            timesteps.append(self.pipeline.noise.draw_timestep(generator))
            clean.append(latents[int(torch.randint(len(latents), (), generator=generator))])
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        images, steps = torch.stack(clean), torch.stack(timesteps).to(self.device)
        return self.pipeline.noise.add(images, torch.stack(noise).to(images), steps), steps
