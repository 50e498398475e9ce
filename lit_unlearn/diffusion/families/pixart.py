"""PixArt-Alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.families.forms import check_equal, check_latents
from lit_unlearn.diffusion.lower_case import as_stored
from lit_unlearn.diffusion.noise import DDPM
from lit_unlearn.diffusion.offload import bring, call_with
from lit_unlearn.diffusion.parts import Part
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import decode_latents, encode_pictures
from lit_unlearn.diffusion.text import TextEncoder, Tokens

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel, SchedulerMixin
    from transformers import T5EncoderModel, T5Tokenizer

TOLD_SIDE = 128
"""Side of the latents of the models that diffusers tells the size of a picture."""


def declare(length: int) -> dict[str, Part]:
    """The parts of a PixArt whose T5 reads at most ``length`` tokens.

    The transformers were published as ``Transformer2DModel``, under which diffusers loads the same class.
    """
    return {
        "tokenizer": Part(("T5Tokenizer", "T5TokenizerFast"), encoder="text_encoder", length=length, lowers=True),
        "text_encoder": Part(("T5EncoderModel",)),
        "transformer": Part(("PixArtTransformer2DModel", "Transformer2DModel")),
        "vae": Part(("AutoencoderKL",)),
        "scheduler": Part(),
    }


@dataclass(eq=False)
class PixArtAlpha(Pipeline):
    """PixArt-Alpha (Chen et al., 2024a): a transformer whose cross-attention reads the states of a T5.

    A projection of two layers brings the states to the width of the transformer. Padding behind a text is read by
    nothing: its states are 0 in a condition, and the mask leaves it out. Prompts are read in lower case, as diffusers
    does with ``clean_caption=False``. Where the transformer predicts a variance beside the noise, that is left out.

    Attributes:
        tokenizer: Turns prompts into ``input_ids`` of the T5.
        text_encoder: ``input_ids`` (B, L) to states (B, L, D).
        transformer: Predicts noise (B, C, H, W), perhaps with a variance, from latents, timesteps, states and their
            mask (B, L), and from the size of the picture in models for 1024 pixels.
        vae: Latents (B, C, H, W) to pictures (B, 3, 8H, 8W) and back.
        scheduler: The sampler's configuration; every sampling takes a fresh copy.
    """

    index_class: ClassVar[str] = "PixArtAlphaPipeline"
    title: ClassVar[str] = "PixArt-Alpha"
    form: ClassVar[str] = "a T5EncoderModel, a PixArtTransformer2DModel and an AutoencoderKL"
    length: ClassVar[int] = 120
    """Most tokens that the T5 reads, as by default in diffusers; fewer if its tokenizer has a lower limit."""
    tells_size: ClassVar[bool] = True
    """Whether diffusers tells transformers with latents of ``TOLD_SIDE`` the size and shape of a picture."""
    declared: ClassVar[Mapping[str, Part]] = declare(120)
    denoiser_part: ClassVar[str] = "transformer"
    begins: ClassVar[bool] = False
    read_after: ClassVar[Mapping[str, Mapping[str, int]]] = {"text_encoder": {"tokens": -1}}
    ways: ClassVar[tuple[str, ...]] = ("tokens", "projected")
    loads_lora: ClassVar[bool] = False

    tokenizer: T5Tokenizer
    text_encoder: T5EncoderModel
    transformer: PixArtTransformer2DModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin

    @classmethod
    def check_forms(cls, configs: Mapping[str, Any], model: str) -> None:
        """See ``Pipeline.check_forms``."""
        text, transformer = configs["text_encoder"], configs["transformer"]
        inputs = transformer.in_channels
        out = inputs if transformer.out_channels is None else transformer.out_channels
        field = "half of transformer out_channels" if out == 2 * inputs else "transformer out_channels"
        channels = {"transformer in_channels": inputs, field: out // 2 if out == 2 * inputs else out}
        check_latents(channels, configs["vae"], model)
        widths = {"transformer caption_channels": transformer.caption_channels, "text_encoder d_model": text.d_model}
        check_equal(widths, model)
        inner = transformer.num_attention_heads * transformer.attention_head_dim
        width = "transformer num_attention_heads times attention_head_dim"
        check_equal({"transformer cross_attention_dim": transformer.cross_attention_dim, width: inner}, model)
        size, patch = transformer.sample_size, transformer.patch_size
        if not isinstance(size, int) or size < 1 or size % patch:
            raise ValueError(
                f"model={model!r}: transformer/config.json has sample_size={size!r}: give the side of the latents, a "
                f"multiple of patch_size={patch}."
            )
        told = transformer.use_additional_conditions
        if (size == TOLD_SIDE if told is None else told) and not (cls.tells_size and size == TOLD_SIDE):
            who = f"to models of sample_size={TOLD_SIDE}" if cls.tells_size else "to none of this family"
            raise ValueError(
                f"model={model!r}: transformer/config.json has sample_size={size} and use_additional_conditions="
                f"{told}, so that it takes the size of a picture, which diffusers gives {who}: copy the part again, "
                "with its config.json."
            )

    @classmethod
    def process(cls, scheduler: Any, denoiser_config: Mapping[str, Any]) -> DDPM:
        """See ``Pipeline.process``."""
        return DDPM(scheduler)

    @property
    def texts(self) -> tuple[TextEncoder, ...]:
        """See ``Pipeline.texts``."""
        length = min(self.length, self.tokenizer.model_max_length)
        return (TextEncoder("text_encoder", self.text_encoder, self.tokenizer, positions=length, masked=True),)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See ``Pipeline.latent_shape``."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def num_places(self, name: str) -> int:
        """See ``Pipeline.num_places``; all blocks work on the same patches."""
        return (self.transformer.config.sample_size // self.transformer.config.patch_size) ** 2

    def read_positions(self, tokens: Tokens) -> Tensor:
        """See ``ReadsText.read_positions``: without padding."""
        return self.texts[0].reads(tokens.ids[0])

    def condition(self, tokens: Tokens) -> Condition:
        """See ``Pipeline.condition``; states of padding are 0."""
        states = self.texts[0].states(tokens.ids[0])
        mask = self.read_positions(tokens).to(states.device)
        return Condition(states * mask.unsqueeze(-1), mask=mask)

    def first_inputs(self, condition: Condition) -> dict[str, Tensor]:
        """See ``Pipeline.first_inputs``; what the cross-attention reads is ``projected``."""
        bring(self.transformer)
        projection: Any = self.transformer.caption_projection
        return {"tokens": condition.states, "projected": projection(condition.states)}

    def predict(
        self, x_t: Tensor, timesteps: Tensor, condition: Condition, values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See ``Pipeline.predict``; without a variance."""
        options = {
            "encoder_hidden_states": condition.states,
            "encoder_attention_mask": condition.mask,
            "timestep": timesteps.to(x_t.device).expand(len(x_t)),
            "added_cond_kwargs": self._size(condition),
        }
        if values is None:
            output = self.transformer(x_t, **options).sample
        else:
            output = call_with(self.transformer, values, (x_t,), options).sample
        return output[:, : x_t.shape[1]]

    def _size(self, condition: Condition) -> dict[str, Tensor | None]:
        """What the transformer is told of a picture, if it takes that: height and width (B, 2), their ratio (B, 1)."""
        if not self.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.picture_size
        told = ("resolution", [height, width]), ("aspect_ratio", [height / width])
        kind: Any = {"dtype": condition.states.dtype, "device": condition.states.device}
        return {name: torch.tensor([values], **kind).repeat(len(condition), 1) for name, values in told}

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """See ``Pipeline.encode_pictures``."""
        return encode_pictures(self.vae, pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Pipeline.decode``."""
        return decode_latents(self.vae, latents)

    def to_diffusers(self) -> PixArtAlphaPipeline:
        """The same parts as a pipeline of diffusers."""
        import diffusers

        kind: Any = getattr(diffusers, self.index_class)
        return kind(  # type: ignore[no-any-return]
            tokenizer=as_stored(self.tokenizer),
            text_encoder=self.text_encoder,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=self.scheduler,
        )


class PixArtSigma(PixArtAlpha):
    """PixArt-Sigma (Chen et al., 2024b): as PixArt-Alpha, with longer prompts, and not told the size of a picture."""

    index_class: ClassVar[str] = "PixArtSigmaPipeline"
    title: ClassVar[str] = "PixArt-Sigma"
    length: ClassVar[int] = 300
    tells_size: ClassVar[bool] = False
    declared: ClassVar[Mapping[str, Part]] = declare(300)


__all__ = ["PixArtAlpha", "PixArtSigma"]
