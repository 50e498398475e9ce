"""Concept Ablation (Kumari et al., ICCV 2023): trains prompts of a concept to draw what an anchor's prompts draw.

Data flow: before the first step the pretrained model draws pictures of the anchor's prompts, once, into a cache on
disk. A step adds noise to some of them and reduces the error between the prediction for the concept's prompt and either
the prediction for the anchor's prompt (model-based) or the noise itself (noise-based).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_unlearn.data.augmentation import WORDS, reframe
from lit_unlearn.data.concepts import Concept
from lit_unlearn.data.names import find_names, replace_spans
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.text import TextEncoder, linear_layers
from lit_unlearn.diffusion.vocabulary import TABLES
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.methods.shared.latents import PretrainedSampler
from lit_unlearn.system.names import check_numbers
from lit_unlearn.system.pixels import to_uint8


class Draw(NamedTuple):
    """The data of one step.

    Attributes:
        latents: Clean anchor pictures, (B, C, H, W).
        noise: Standard normal, (B, C, H, W).
        timesteps: (B,).
        mask: Latents that count in the loss, (B, 1, H, W), bool.
        prompts: Indices into ``concept_prompts`` and ``anchor_prompts``, (B,), on the CPU.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    mask: Tensor
    prompts: Tensor


class ConceptAblation(GradientEditor, ConceptEditor):
    """Trains the model to predict for prompts of the concept what it predicts for prompts of its anchor.

    Args:
        objective: Target of the prediction for the concept's prompt: ``model`` (a prediction for the anchor's prompt)
            or ``noise`` (the noise that was added to the anchor's picture).
        reference: Network that makes the prediction for the anchor's prompt: ``live`` (the edited one, no gradient; as
            in the paper) or ``frozen`` (the pretrained one).
        prompts: ``pairs`` (the set's edit prompts, anchored by its target prompts), or ``names`` (the concept's
            ``anchor``, and the same with the target's name replaced by each of the concept's names).
        images: Number of anchor pictures of each concept; they use the anchor's prompts in turn.
        anchor_inference_steps: Denoising steps of the anchor pictures; null takes ``num_inference_steps``.
        anchor_guidance_scale: Guidance of the anchor pictures; null takes ``guidance_scale``.
        anchor_folder: Folder that keeps the anchor pictures for later runs.
        anchor_batch_size: Anchor pictures drawn at once.
        prior_weight: Weight of the diffusion loss of the anchor pictures with their own prompts; 0 leaves it out.
        augmentation: Train on pictures at random scales, with words in the prompts that describe the scale.
        freeze_bos: Stop the gradient through keys and values of the first token, as in the paper's code.
        scale_lr: Multiply the learning rate by the number of pictures of an optimizer step: batch over all devices
            times accumulated batches.
        optimizer: Optimizer of the edited weights.
        edited_parameters: ``xattn-kv``, ``full``, ``embedding`` (of the token embedding only the concept's own rows
            learn), another group, or a pattern.
        **kwargs: See ``GradientEditor``, ``ConceptEditor`` and ``DiffusionEditor``.
    """

    num_pairs: int

    def __init__(
        self,
        objective: Literal["model", "noise"] = "model",
        reference: Literal["live", "frozen"] = "live",
        prompts: Literal["pairs", "names"] = "pairs",
        images: int = 200,
        anchor_inference_steps: int | None = None,
        anchor_guidance_scale: float | None = None,
        anchor_folder: str = "logs/anchors",
        anchor_batch_size: int = 8,
        prior_weight: float = 0.0,
        augmentation: bool = False,
        freeze_bos: bool = False,
        scale_lr: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        edited_parameters: str = "xattn-kv",
        **kwargs: object,
    ) -> None:
        super().__init__(optimizer=optimizer, edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        check_numbers(
            "model",
            images=images,
            anchor_inference_steps=anchor_inference_steps,
            anchor_batch_size=anchor_batch_size,
        )
        if prior_weight < 0:
            raise ValueError(f"model.prior_weight={prior_weight} must not be negative: 0 leaves the regulariser out.")
        if objective == "model" and reference == "live" and (circle := anchored_in_circle(self.repaired)):
            raise ValueError(
                f"model.reference=live has no fixed target for {', '.join(circle)}, since each is an anchor of "
                "another: set model.reference to frozen."
            )
        self.objective, self.reference, self.images = objective, reference, images
        self.anchor_inference_steps = anchor_inference_steps or self.num_inference_steps
        self.base.check_steps(self.anchor_inference_steps, "model.anchor_inference_steps")
        self.anchor_guidance_scale = self.guidance_scale if anchor_guidance_scale is None else anchor_guidance_scale
        self.anchor_folder, self.anchor_batch_size = anchor_folder, anchor_batch_size
        self.prior_weight, self.augmentation = prior_weight, augmentation
        if freeze_bos and self.base.names and not self.base.family.begins:
            raise ValueError(
                "model.freeze_bos=true stops a gradient in keys and values of cross-attention to the token that begins "
                f"every prompt, which {self.base.family.title} does not have: set it to false."
            )
        self.freeze_bos, self.scale_lr = freeze_bos, scale_lr
        self.pairs = [ablation_pairs(concept, prompts) for concept in self.repaired]
        self.targets_of_edited = list(zip(self.repaired, self.pairs, strict=True))
        self.words = WORDS if augmentation else WORDS[:1]
        endings = [(mine, theirs, words) for words in self.words for pair in self.pairs for mine, theirs in pair]
        self.concept_prompts = [mine + words for mine, _, words in endings]
        self.anchor_prompts = [theirs + words for _, theirs, words in endings]
        self.num_pairs = images * len(self.edited)  # a batch holds pictures

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights that the pattern selects.

        Raises:
            ValueError: It selects a weight that does not affect any prediction.
        """
        why = ", which does not affect any prediction: choose weights of the denoiser and the text encoders."
        return self.select_only(names, lambda name: not name.startswith("vae."), why)

    # --- set-up

    def configure_model(self) -> None:
        """Load the pipeline; if the token embedding is trained, restrict its gradient to the concepts' rows."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        texts = {text.part: text for text in self.pipeline.texts}
        self.attention_inputs = linear_layers(self.pipeline.denoiser, ("attn2.to_k", "attn2.to_v"))
        self.rows: dict[str, Tensor] = {}
        for name in self.edited_names:
            if name.endswith(TABLES):
                parameter = self.pretrained.parameters[name]
                rows = torch.zeros(len(parameter), 1, dtype=torch.bool)
                rows[self.own_tokens(texts[name.partition(".")[0]])] = True
                self.rows[name] = rows
                parameter.register_hook(lambda grad, rows=rows: grad * rows.to(grad.device))

    def own_tokens(self, text: TextEncoder) -> list[int]:
        """Tokens of the concepts' names that do not occur in their anchors, as ``text`` reads them.

        Raises:
            ValueError: A concept does not have such a token.
        """

        def tokens(texts: Sequence[str]) -> set[int]:
            return {token for words in texts for token in text.words(words)}

        found: set[int] = set()
        for concept, pair in zip(self.edited, self.pairs, strict=True):
            own = tokens(concept.names) - tokens([concept.anchor, *(anchor for _, anchor in pair)])
            if not own:
                raise ValueError(
                    f"edited_parameters={self.edited_parameters!r} leaves no row to train, since the anchor of "
                    f"{concept.name!r} has all tokens of its names ({', '.join(concept.names)}): choose another anchor."
                )
            found |= own
        return sorted(found)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the edited weights, its learning rate scaled if ``scale_lr`` is set."""
        optimizer = super().make_optimizer()
        if self.scale_lr:
            batch = getattr(self.trainer.datamodule, "batch_size", None) or self.num_pairs  # type: ignore[attr-defined]
            accumulated = self.trainer.accumulate_grad_batches
            for group in optimizer.param_groups:
                scaled = group["lr"] * batch * accumulated
                rank_zero_info(
                    f"Learning rate: {group['lr']:g} × batch {batch} × accumulated {accumulated} = {scaled:g}."
                )
                group["lr"] = scaled
        self.report["learning_rate"] = optimizer.param_groups[0]["lr"]
        return optimizer

    def on_fit_start(self) -> None:
        """Draw or read the anchor pictures; encode the prompts whose encoding does not change."""
        super().on_fit_start()
        self.concept_tokens, self.anchor_tokens = map(
            self.pipeline.tokenize, (self.concept_prompts, self.anchor_prompts)
        )
        with self.pretrained.restored(), torch.no_grad():
            self.concept_known, self.anchor_known = map(
                self.pipeline.encode_many, (self.concept_tokens, self.anchor_tokens)
            )
        self.draw_anchors()

    def draw_anchors(self) -> None:
        """Make the anchor pictures: latents (concepts * images, C, H, W) on the CPU, and indices of their prompts."""
        sampler = PretrainedSampler(
            self, self.anchor_inference_steps, self.anchor_guidance_scale, self.anchor_folder, self.anchor_batch_size
        )
        seeds = [self.seed + number for number in range(self.images)]
        made = self.report.get("anchors", {}).get("made", 0)  # by the run that this one resumes
        latents, places, start = [], [], 0
        for pair in self.pairs:
            prompts = [number % len(pair) for number in range(self.images)]
            cached = sampler.latents([pair[number][1] for number in prompts], seeds)
            latents.append(cached.latents)
            places += [start + number for number in prompts]
            made, start = made + cached.made, start + len(pair)
        self.latents, self.places = torch.cat(latents), places
        self.pictures: dict[int, Tensor] = {}
        self.report["anchors"] = {"pictures": len(self.latents), "made": made}

    # --- a step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The paper's model-based or noise-based loss plus the regulariser, all timesteps with the same weight.

        Args:
            batch: Anchor pictures, numbered as ``ConceptPrompts`` does, (B,).
            batch_idx: Number of the step within the epoch.
        """
        draw, pipeline = self.draw(batch, batch_idx), self.pipeline
        x_t = pipeline.noise.add(draw.latents, draw.noise, draw.timesteps)
        truth = pipeline.noise.target(draw.latents, draw.noise, draw.timesteps)
        with first_token_detached(self.attention_inputs if self.freeze_bos else []):
            prediction = pipeline.predict(x_t, draw.timesteps, self.condition("concept", draw.prompts))
            anchored = (
                pipeline.predict(x_t, draw.timesteps, self.condition("anchor", draw.prompts))
                if self.prior_weight
                else None
            )
        target = truth if self.objective == "noise" else self.anchor_prediction(x_t, draw, anchored)
        loss = masked_error(prediction, target, draw.mask)
        losses = {"train/ablation": loss}
        if anchored is not None:
            losses["train/prior"] = masked_error(anchored, truth, draw.mask)
            loss = loss + self.prior_weight * losses["train/prior"]
        self.log_losses(losses, batch)
        return loss

    @torch.no_grad()
    def anchor_prediction(self, x_t: Tensor, draw: Draw, anchored: Tensor | None) -> Tensor:
        """Predictions (B, C, H, W) of the reference network for the anchors' prompts, without a gradient.

        Args:
            x_t: Noised anchor pictures, (B, C, H, W).
            draw: Data of the step.
            anchored: The live network's prediction, if it was computed before.
        """
        if self.reference == "frozen":
            return self.pretrained_prediction(x_t, draw.timesteps, self.anchor_known[draw.prompts])
        if anchored is not None:
            return anchored.detach()
        return self.pipeline.predict(x_t, draw.timesteps, self.condition("anchor", draw.prompts))

    def condition(self, kind: Literal["concept", "anchor"], places: Tensor) -> Condition:
        """Encode the prompts at ``places`` (B,) with the live text encoder."""
        tokens, known = {
            "concept": (self.concept_tokens, self.concept_known),
            "anchor": (self.anchor_tokens, self.anchor_known),
        }[kind]
        return self.pipeline.encode(tokens[places]) if self.trains_text else known[places]

    def draw(self, batch: Tensor, batch_idx: int) -> Draw:
        """Draw the data for the items of ``batch`` (B,); each item depends only on seed, epoch, step and item."""
        timesteps, noise, latents, masks, prompts = [], [], [], [], []
        for item, generator in zip(batch.tolist(), self.generators(batch, batch_idx), strict=True):
            number = item % self.num_pairs
            clean, place = self.latents[number], self.places[number]
            timesteps.append(self.pipeline.noise.draw_timestep(generator))
            noise.append(torch.randn(clean.shape, generator=generator))
            mask = torch.ones(1, *clean.shape[-2:], dtype=torch.bool)
            if self.augmentation:
                clean, mask, words = reframe(self.picture(number), (clean.shape[-2], clean.shape[-1]), generator)
                place += words * (len(self.concept_prompts) // len(self.words))
            latents.append(clean)
            masks.append(mask)
            prompts.append(place)
        stacked = torch.stack(latents)
        if self.augmentation:
            stacked = self.pipeline.encode_pictures(stacked)
        stacked = stacked.to(self.device, self.weights_dtype)
        return Draw(
            stacked,
            torch.stack(noise).to(stacked),
            torch.stack(timesteps).to(self.device),
            torch.stack(masks).to(self.device),
            torch.tensor(prompts),
        )

    def picture(self, number: int) -> Tensor:
        """Anchor picture ``number`` in pixels (3, H, W), float in [0, 1], decoded once and kept as bytes."""
        if number not in self.pictures:
            self.pictures[number] = to_uint8(self.pipeline.decode(self.latents[number : number + 1]))[0]
        return self.pictures[number].float() / 255

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and undo the weight decay of embedding rows without a gradient."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for name, rows in self.rows.items():
                parameter = self.pretrained.parameters[name]
                original = self.pretrained.beside(name)
                parameter.copy_(torch.where(rows.to(parameter.device), parameter, original))


def ablation_pairs(concept: Concept, prompts: Literal["pairs", "names"]) -> list[tuple[str, str]]:
    """Prompts of ``concept``, each paired with the anchor's prompt.

    Args:
        concept: The concept.
        prompts: ``pairs``: the set's own pairs. ``names``: the anchor, paired with the anchor in which the target's
            name is replaced by each name of the concept, or to which that name is added if the anchor does not name the
            target.
    """
    if prompts == "pairs":
        return list(zip(concept.edit_prompts, concept.target_prompts, strict=True))
    target = find_names(concept.anchor, [concept.target])

    def named(name: str) -> str:
        return replace_spans(concept.anchor, target, name) if target else f"{concept.anchor}, {name}"

    return [(named(name), concept.anchor) for name in concept.names]


def anchored_in_circle(concepts: Sequence[Concept]) -> list[str]:
    """Names of the ``concepts`` whose anchors or targets name each other without end: dog to cat, cat to dog."""
    left = list(concepts)

    def leads_on(concept: Concept) -> bool:
        texts = (concept.anchor, concept.target)
        return any(other.find_name(text) for other in left if other is not concept for text in texts)

    while ends := [concept for concept in left if not leads_on(concept)]:
        left = [concept for concept in left if concept not in ends]
    return [concept.name for concept in left]


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error where ``mask`` (B, 1, H, W) is true, averaged over the pictures; a scalar, float32."""
    errors = (prediction.float() - target.float()).square() * mask
    return (errors.sum(dim=(1, 2, 3)) / (mask.sum(dim=(1, 2, 3)) * errors.shape[1])).mean()


@contextmanager
def first_token_detached(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Stop the gradient through the first position of the outputs (B, L, D) of ``layers``; values do not change."""

    def detach(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(detach).remove)
        yield
