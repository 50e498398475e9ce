"""Reference images of the edited concepts, as latents: from a folder, or drawn by the unedited model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_unlearn.data.images import load_image, read_folder
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.latents import PretrainedSampler
from lit_unlearn.system.names import check_numbers, file_name

ENCODE_PICTURES = 8
"""Number of pictures from a folder that are encoded at once."""


class ReferenceImages(ConceptEditor):
    """Base of the methods that use reference images of the edited concepts.

    Args:
        images: Folder of reference images, which are cropped and resized to the model's size; for several concepts it
            must hold one folder per concept, named as the concept. Null lets the unedited model draw the images.
        num_images: Number of images of each concept that the unedited model draws; from a folder all are used.
        image_seed: Seed of the images that the unedited model draws.
        image_cache: Folder that keeps the latents of these images for later runs.
        **kwargs: See ``ConceptEditor``.

    Raises:
        ValueError: The folder is missing or has no pictures, or a file in it is not a readable picture.
    """

    def __init__(
        self,
        images: str | None = None,
        num_images: int = 10,
        image_seed: int = 0,
        image_cache: str = "logs/references",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        check_numbers("model", num_images=num_images)
        self.num_images, self.image_seed, self.image_cache = num_images, image_seed, image_cache
        self.image_files: list[list[Path]] = []
        if images is not None:
            root = Path(images).expanduser()
            folders = [root]
            if len(self.edited) > 1:
                folders = [concept_folder(root, concept.name) for concept in self.edited]
            self.image_files = [
                [image.path for image in read_folder(str(folder), "model.images", caption="")] for folder in folders
            ]

    @torch.no_grad()
    def reference_latents(self, prompts: Sequence[Sequence[str]]) -> list[Tensor]:
        """Latents (n, C, H, W) of the images of each edited concept, the same on every process.

        Args:
            prompts: Prompts of each concept; images use them in turn.
        """
        if self.image_files:
            return [self.processes.made_once(len(files), partial(self._encode, files)) for files in self.image_files]
        texts = [own[i % len(own)] for own in prompts for i in range(self.num_images)]
        first = [self.image_seed + 100_000 * number for number in range(len(prompts))]
        seeds = [number + i for number in first for i in range(self.num_images)]
        sampler = PretrainedSampler(self, self.num_inference_steps, self.guidance_scale, self.image_cache)
        latents = sampler.latents(texts, seeds).latents.to(self.device, self.pipeline.dtype)
        return list(latents.split(self.num_images))

    def _encode(self, files: Sequence[Path], rows: list[int]) -> Tensor:
        pictures = torch.stack([load_image(files[row], self.pipeline.picture_size) for row in rows])
        return torch.cat([self.pipeline.encode_pictures(part) for part in pictures.split(ENCODE_PICTURES)])


def concept_folder(folder: Path, name: str) -> Path:
    """Folder of the concept ``name`` below ``folder``; spaces may be underscores."""
    exact = folder / name
    return exact if exact.is_dir() else folder / file_name(name)
