"""Recognises the layout of a single file from the names in it, and finds the place of each weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lit_unlearn.diffusion.single_file import names
from lit_unlearn.diffusion.single_file.names import Keys, Namer

DENOISER_PREFIXES = ("model.diffusion_model.", "")
"""Beginnings of the denoiser's names; files of a denoiser alone often have none."""
TEXT_ENCODERS: tuple[tuple[str, str, str, Namer], ...] = (
    (
        "text_encoder",
        "cond_stage_model.transformer.",
        "text_model.embeddings.token_embedding.weight",
        names.clip,
    ),
    ("text_encoder", "cond_stage_model.transformer.", "embeddings.token_embedding.weight", names.old_clip),
    ("text_encoder", "cond_stage_model.model.", "token_embedding.weight", names.open_clip),
    (
        "text_encoder",
        "conditioner.embedders.0.transformer.",
        "text_model.embeddings.token_embedding.weight",
        names.clip,
    ),
    ("text_encoder_2", "conditioner.embedders.1.model.", "token_embedding.weight", names.open_clip),
    (
        "text_encoder",
        "text_encoders.clip_l.transformer.",
        "text_model.embeddings.token_embedding.weight",
        names.clip,
    ),
    (
        "text_encoder_2",
        "text_encoders.clip_g.transformer.",
        "text_model.embeddings.token_embedding.weight",
        names.clip,
    ),
)
"""Part, prefix, a name by which it is recognised, and how it is named."""
T5 = "text_encoders.t5xxl.transformer."
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
FIRST_KEYS = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
WIDTH_OF_2 = 1024
"""Width of the text states in Stable Diffusion 2; in 1 it is 768."""
NO_WEIGHTS = re.compile(
    r".*\bposition_ids|(.*\.)?logit_scale|text_projection(\.weight)?|v_pred|ztsnr|edm_\w+|(loss|model_ema)\..*"
)
"""Names within a part of tensors that are no weights of diffusers' models."""
LAST_OF_OPEN_CLIP = re.compile(r"transformer\.resblocks\.23\..*")
"""The last layer of the text encoder of Stable Diffusion 2, which nothing reads and diffusers does not have."""
AVERAGED = "model_ema."
"""Prefix of the averaged copy of the UNet's weights that training keeps."""
PLACES = {
    "unet": "model.diffusion_model.*",
    "transformer": "model.diffusion_model.*",
    "vae": "first_stage_model.*",
    "text_encoder": "cond_stage_model.*, conditioner.embedders.0.* or text_encoders.clip_l.*",
    "text_encoder_2": "conditioner.embedders.1.*, text_encoders.clip_g.* or text_encoders.t5xxl.*",
    "text_encoder_3": "text_encoders.t5xxl.*",
}
"""Names of the parts' weights in a file, for messages."""


@dataclass(frozen=True)
class Place:
    """Where a weight is stored in a file.

    Attributes:
        key: Name of the tensor in the file.
        shape: Shape of the weight in diffusers.
        rows: Ranges of the tensor's rows, as (start, stop), in the order in which diffusers has them.
        transposed: Whether the file has the transposed matrix.
        copies: Names of other tensors in the file that hold the same.
    """

    key: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    transposed: bool = False
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A part of a model in a file: the beginning of its names, the rest of each, and how to name them."""

    prefix: str
    namer: Namer
    keys: Keys


class Layout:
    """The parts of a single file, and where each weight of them is.

    Args:
        shapes: Shape of each tensor in the file, by its name there.
        path: The file, for messages.

    Attributes:
        family: The family of models, such as ``Stable Diffusion XL``.

    Raises:
        ValueError: The names are not those of a layout that is known; the message says what they look like.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
        self.shapes, self.path = shapes, path
        self._parts: dict[str, _Part] = {}
        self.family = self._find_denoiser()
        for part, prefix, name, namer in TEXT_ENCODERS:
            if part not in self._parts and prefix + name in shapes:
                self._add(part, prefix, namer)
        if T5 + "shared.weight" in shapes:
            self._add("text_encoder_2" if self.family == "FLUX.1" else "text_encoder_3", T5, names.t5)
        for prefix in AUTOENCODER_PREFIXES:
            if prefix + "decoder.conv_in.weight" in shapes:
                self._add("vae", prefix, names.autoencoder)
        if not self._parts:
            raise ValueError(f"{path} {self._what_else()}.")

    def _find_denoiser(self) -> str:
        for prefix in DENOISER_PREFIXES:
            if prefix + "joint_blocks.0.context_block.attn.qkv.weight" in self.shapes:
                self._add("transformer", prefix, names.stable_diffusion_3)
                return "Stable Diffusion 3"
            # FLUX.2 and Chroma have such blocks too, but no pooled vector.
            marks = (f"{prefix}double_blocks.0.txt_attn.qkv.weight", f"{prefix}vector_in.in_layer.weight")
            if all(mark in self.shapes for mark in marks):
                self._add("transformer", prefix, names.flux)
                return "FLUX.1"
            if prefix + "input_blocks.0.0.weight" in self.shapes:
                self._add("unet", prefix, names.unet)
                return self._family_of_unet(prefix)
        return self._family_of_unet("")

    def _family_of_unet(self, prefix: str) -> str:
        sizes = f"{prefix}label_emb.0.0.weight"
        if sizes in self.shapes or any(key.startswith("conditioner.embedders.") for key in self.shapes):
            return "Stable Diffusion XL"
        width = self.shapes.get(f"{prefix}{FIRST_KEYS}", (0, 0))[-1]
        if width == WIDTH_OF_2 or "cond_stage_model.model.ln_final.weight" in self.shapes:
            return "Stable Diffusion 2"
        return "Stable Diffusion 1"

    def _add(self, part: str, prefix: str, namer: Namer) -> None:
        keys = frozenset(key.removeprefix(prefix) for key in self.shapes if key.startswith(prefix))
        self._parts[part] = _Part(prefix, namer, keys)

    def _what_else(self) -> str:
        """What a file without a known part is, and what to give in its place."""
        if any(key.startswith(AVERAGED) for key in self.shapes):
            return (
                f"holds averaged weights alone ({AVERAGED}*), which are not those that programs load: give the file "
                "that has model.diffusion_model.* too"
            )
        if any("lora_" in key or ".lora" in key for key in self.shapes):
            return "holds LoRA weights, no model: give the checkpoint of the model"
        if any(key.startswith(("down_blocks.", "transformer_blocks.", "encoder.layers.")) for key in self.shapes):
            return (
                "is one part of a model with diffusers' names: export a folder (without --format single), or give a "
                "checkpoint in the layout of the original code"
            )
        if self.shapes and all(key.startswith(tuple(f"{part}." for part in PLACES)) for key in self.shapes):
            return "holds some weights by lit-unlearn's names, no model: an edit (a delta) is given as --ckpt_path"
        example = next(iter(self.shapes), None)
        return (
            f"is no checkpoint of Stable Diffusion 1, 2, XL, 3 or FLUX.1 in the layout of the original code "
            f"({'it is empty' if example is None else f'it has {example!r:.80}'}): give such a file"
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that the file holds, as diffusers has them."""
        return tuple(self._parts)

    @property
    def averaged(self) -> int:
        """Number of tensors of the averaged copy of the UNet."""
        return sum(key.startswith(AVERAGED) for key in self.shapes)

    def prefix(self, part: str) -> str:
        """Beginning of the names of a part."""
        return self._parts[part].prefix

    def has(self, name: str) -> bool:
        """Whether the file holds the weight ``name`` (part first)."""
        part, _, rest = name.partition(".")
        known = self._parts.get(part)
        spot = known and known.namer(rest, known.keys)
        return bool(known and spot and known.prefix + spot.key in self.shapes)

    def identity(self, name: str) -> int | None:
        """Width of the projection ``name`` of a CLIP if the file leaves it out, and diffusers takes the identity."""
        part, _, rest = name.partition(".")
        if self.family != "Stable Diffusion 3" or rest != "text_projection.weight" or self.has(name):
            return None
        norm = f"{part}.final_layer_norm.weight"
        return self.place(norm).shape[0] if self.has(norm) else None

    def unclaimed(self, part: str, names: Iterable[str]) -> list[str]:
        """Tensors of a part, without its prefix, that belong to none of the weights ``names`` (without the part)."""
        known = self._parts[part]
        spots = [known.namer(name, known.keys) for name in names]
        claimed = {key for spot in spots if spot is not None for key in (spot.key, *spot.copies)}
        others = tuple(other.prefix for other in self._parts.values() if other.prefix)
        found = []
        for key in sorted(known.keys - claimed):
            of_another = not known.prefix and key.startswith(others)
            unread = self.family == "Stable Diffusion 2" and LAST_OF_OPEN_CLIP.fullmatch(key)
            if not (of_another or unread or NO_WEIGHTS.fullmatch(key)):
                found.append(key)
        return found

    def place(self, name: str) -> Place:
        """Where the weight ``name`` is stored.

        Args:
            name: Its name in diffusers, part first: ``unet.mid_block.attentions.0...``.

        Raises:
            ValueError: The file does not hold that part or that weight; the message says what is missing.
        """
        part, _, rest = name.partition(".")
        if part not in self._parts:
            raise ValueError(f"{self.path} {self._why_not(part)}, and the edit changes {name}: {self._remedy(part)}.")
        known = self._parts[part]
        spot = known.namer(rest, known.keys)
        if spot is None:
            raise ValueError(
                f"{self.path} has no single place for {name} in the layout of {self.family}: export a folder or a "
                "delta."
            )
        key = known.prefix + spot.key
        if key not in self.shapes:
            raise ValueError(
                f"{self.path} has no {key!r}, where {name} of {self.family} belongs: give the whole checkpoint of the "
                "model that was edited."
            )
        stored = self.shapes[key]
        if spot.convolution and stored[2:] == (1, 1):
            stored = stored[:2]
        rows = tuple((start * stored[0] // of, stop * stored[0] // of) for start, stop, of in spot.fractions)
        if not rows:
            rows = ((0, stored[0]),) if stored else ()
        elif any(stored[0] % of for _, _, of in spot.fractions):
            raise ValueError(
                f"{self.path} has {key!r} with {stored[0]} rows, which do not divide into {spot.fractions[0][2]} parts "
                f"as {self.family} does: give the checkpoint of the model that was edited."
            )
        shape = (sum(stop - start for start, stop in rows), *stored[1:]) if stored else ()
        copies = tuple(known.prefix + copy for copy in spot.copies)
        return Place(key, shape[::-1] if spot.transposed else shape, rows, spot.transposed, copies)

    def _why_not(self, part: str) -> str:
        where = PLACES.get(part, f"{part}.*")
        if part == "unet" and self.averaged:
            return f"holds the averaged weights of the UNet alone ({AVERAGED}*, no {where})"
        if part.startswith("text_encoder") and self.parts in (("transformer",), ("unet",)):
            return f"holds the {self.parts[0]} alone, no {part} (no {where})"
        return f"holds no {part} (no {where})"

    def _remedy(self, part: str) -> str:
        if part.startswith("text_encoder"):
            return "give a checkpoint that holds its encoders, or export a folder or a delta"
        return "give the whole checkpoint of the model that was edited"
