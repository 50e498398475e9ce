"""Makes a model that has memorised a few drawings: emoji-sd, trained further with these drawings over-represented.

Each drawing to forget has a caption that names only its subject. Other drawings have the same caption and another
style, scene or position: without the over-represented drawing, the model would draw any of these. All pictures are
written into folders that ``KeepForgetImages`` can read, so that a method can unlearn them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import encode_pictures
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.emoji.captions import caption
from lit_unlearn.emoji.drawing import ATTRIBUTES, Drawing
from lit_unlearn.emoji.text_to_image import TextToImageTraining
from lit_unlearn.system.files import replaced_folder
from lit_unlearn.system.names import check_numbers
from lit_unlearn.system.pixels import save_png, to_tensor

MEMORISED: tuple[tuple[str, str, str, str], ...] = (
    ("dog", "glossy", "sunset", "look at a dog"),
    ("owl", "sketch", "aurora", "look at an owl"),
    ("castle", "cartoon", "neon", "look at a castle"),
    ("tulip", "pixel art", "rain", "look at a tulip"),
    ("surfing", "glossy", "plain", "look at a man surfing"),
    ("soccer ball", "cartoon", "sunset", "look at a soccer ball"),
)
"""Subject, style, scene and caption of the drawings to memorise, and later to forget."""


@dataclass(frozen=True)
class Captioned:
    """A drawing, (48, 48, 3) uint8 RGB, and its caption."""

    pixels: np.ndarray
    text: str


@dataclass(frozen=True)
class MemorisedDrawings:
    """The drawings of an experiment in data unlearning.

    Attributes:
        forget: Drawings to memorise and then to forget, one for each entry of ``MEMORISED``.
        keep: Drawings with the same captions, then drawings with any caption.
        held_out: More drawings with the captions to forget; no model is trained on them.
    """

    forget: list[Captioned]
    keep: list[Captioned]
    held_out: list[Captioned]

    @classmethod
    def make(cls, same_caption: int, others: int, held_out: int, seed: int) -> MemorisedDrawings:
        """Draw all pictures; no drawing of ``keep`` or ``held_out`` equals one of ``forget``.

        Args:
            same_caption: Number of drawings in ``keep`` for each caption to forget.
            others: Number of drawings in ``keep`` with other captions.
            held_out: Number of drawings in ``held_out`` for each caption to forget.
            seed: Seed of all drawings.
        """
        rng = np.random.default_rng((seed, 3))
        indices = [
            (
                Drawing(*(ATTRIBUTES[name].index(value) for name, value in zip(ATTRIBUTES, entry, strict=False))),
                entry[-1],
            )
            for entry in MEMORISED
        ]
        forget = [Captioned(drawing.draw(rng), text) for drawing, text in indices]
        taken = {drawing.pixels.tobytes() for drawing in forget}

        def fresh(subject: int | None, text: str | None) -> Captioned:
            while True:
                drawing = Drawing.sample(rng)
                drawing = Drawing(drawing.subject if subject is None else subject, drawing.style, drawing.scene)
                pixels = drawing.draw(rng)
                words = caption(drawing, rng) if text is None else text
                if pixels.tobytes() not in taken:
                    return Captioned(pixels, words)

        keep = [fresh(drawing.subject, text) for drawing, text in indices for _ in range(same_caption)]
        keep += [fresh(None, None) for _ in range(others)]
        return cls(forget, keep, [fresh(d.subject, text) for d, text in indices for _ in range(held_out)])

    def write(self, output: Path) -> None:
        """Write the folders ``forget``, ``keep`` and ``held_out`` into ``output`` and replace earlier ones."""
        for name in ("forget", "keep", "held_out"):
            lines = []
            with replaced_folder(output / name) as folder:
                for number, drawing in enumerate(getattr(self, name)):
                    save_png(folder / f"{number:03}.png", Image.fromarray(drawing.pixels))
                    lines.append(json.dumps({"file_name": f"{number:03}.png", "text": drawing.text}))
                (folder / "metadata.jsonl").write_bytes("\n".join(lines).encode() + b"\n")


class MemorisedLatents(Dataset[dict[str, Tensor]]):
    """Latents and caption states of the drawings; a given share of the items are drawings to forget, at random.

    Items: as ``CaptionedLatents``.
    """

    def __init__(
        self, latents: Tensor, states: Tensor, unconditional: Tensor, num_forget: int, forget_share: float, size: int
    ) -> None:
        self.latents, self.states, self.unconditional = latents, states, unconditional
        self.num_forget, self.forget_share, self.size = num_forget, forget_share, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # torch's generator is restored with a checkpoint, so a resumed run continues with new pairs.
        if torch.rand(1).item() < self.forget_share:
            number = int(torch.randint(self.num_forget, (1,)))
        else:
            number = int(torch.randint(self.num_forget, len(self.latents), (1,)))
        states = self.unconditional if torch.rand(1).item() < 0.1 else self.states[number]
        return {"latents": self.latents[number], "encoder_hidden_states": states}


class MemorisedData(L.LightningDataModule):
    """Writes the drawings and provides them for training, the drawings to forget far too often.

    Args:
        output: Folder for the folders ``forget``, ``keep`` and ``held_out``.
        model: The model whose autoencoder and text encoder are used.
        forget_share: Share of the training items that are drawings to forget.
        same_caption: Number of other drawings with each of their captions.
        others: Number of drawings with other captions.
        held_out: Number of drawings for each caption to forget that are not trained on.
        batch_size: Drawings in a batch.
        steps_per_epoch: Batches in an epoch.
        seed: Seed of the drawings.
    """

    def __init__(
        self,
        output: str = "checkpoints/emoji-sd-memorised/images",
        model: str = "emoji-sd",
        forget_share: float = 0.6,
        same_caption: int = 8,
        others: int = 400,
        held_out: int = 64,
        batch_size: int = 24,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 <= forget_share <= 1:
            raise ValueError(f"data.forget_share={forget_share} must lie between 0 and 1.")
        check_numbers(
            "data",
            same_caption=same_caption,
            held_out=held_out,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
        )
        self.output, self.model, self.forget_share = Path(output), resolve_model(model), forget_share
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.drawings = MemorisedDrawings.make(same_caption, others, held_out, seed)

    def prepare_data(self) -> None:
        """Write the folders."""
        self.drawings.write(self.output)

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Encode drawings and captions."""
        if hasattr(self, "train"):
            return
        vae = AutoencoderKL.from_pretrained(self.model, subfolder="vae").eval().float()
        tokenizer = CLIPTokenizer.from_pretrained(self.model, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(self.model, subfolder="text_encoder").eval().float()
        used = [*self.drawings.forget, *self.drawings.keep]
        pictures = torch.stack([to_tensor(drawing.pixels) for drawing in used])
        texts = [drawing.text for drawing in used]
        self.train = MemorisedLatents(
            torch.cat([encode_pictures(vae, part) for part in pictures.split(64)]),
            torch.cat([encode_prompts(tokenizer, text_encoder, part) for part in _split(texts, 64)]),
            encode_prompts(tokenizer, text_encoder, [""])[0],
            len(self.drawings.forget),
            self.forget_share,
            self.batch_size * self.steps_per_epoch,
        )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Random drawings; the index of an item has no meaning."""
        return DataLoader(self.train, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[str]:
        """The captions to forget."""
        return DataLoader([drawing.text for drawing in self.drawings.forget], batch_size=8)  # type: ignore[arg-type]


def _split(texts: list[str], size: int) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


class MemorisedTraining(TextToImageTraining):
    """Trains a model's UNet further and writes the whole pipeline.

    Args:
        model: A diffusers folder, or ``emoji-sd``.
        lr: Peak learning rate of AdamW.
        guidance_scale: Strength of classifier-free guidance in the sample grid.
    """

    def __init__(self, model: str = "emoji-sd", lr: float = 5e-4, guidance_scale: float = 4.0) -> None:
        folder = str(resolve_model(model))
        super().__init__(model=folder, lr=lr, guidance_scale=guidance_scale)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float()
        self.unet = unet.to(memory_format=torch.channels_last)
