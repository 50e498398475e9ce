"""Folders of captioned pictures to keep and to forget: pairs of pictures for ``fit``, captions as prompts for ``test``.

A caption is looked up as in Hugging Face's ``imagefolder``: in ``metadata.jsonl`` (``file_name``, ``text``), else in a
text file with the picture's name (``dog.png``, ``dog.txt``); or one caption is given for all pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_unlearn.data.fit_plan import fit_plan_of
from lit_unlearn.data.prompts import RankSampler
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.system.names import check_numbers

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"
MIN_SIDE = 8
"""Least width and height of a picture, in pixels."""

Pairing = Literal["caption", "any"]


@dataclass(frozen=True)
class CaptionedImage:
    """A picture on disk; ``digest`` is the SHA-256 of its pixels, the same for copies in other lossless formats."""

    path: Path
    caption: str
    digest: str


def read_image(path: Path) -> Image.Image:
    """Open a picture as RGB, upright.

    Raises:
        ValueError: The file is not a readable picture, or the picture is too small.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{path} is no readable picture ({reason}): replace or remove it.") from error
    if min(image.size) < MIN_SIDE:
        raise ValueError(
            f"{path} has {image.width} x {image.height} pixels: at least {MIN_SIDE} x {MIN_SIDE} are needed."
        )
    return image


def load_image(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture, cut around its centre and resized to ``size`` (height, width): (3, *size), float32 in [0, 1]."""
    image = read_image(path)
    height, width = size
    scale = min(image.height / height, image.width / width)
    cut_height, cut_width = round(height * scale), round(width * scale)
    left, top = (image.width - cut_width) // 2, (image.height - cut_height) // 2
    image = image.crop((left, top, left + cut_width, top + cut_height))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_folder(folder: str, field: str, caption: str | None = None) -> list[CaptionedImage]:
    """The pictures of ``folder`` and its subfolders, sorted by path, each with its caption.

    Args:
        folder: The folder.
        field: Name of the option for the folder, for messages.
        caption: One caption for all pictures; null looks up a caption for each.

    Raises:
        ValueError: The folder does not exist or contains no picture, a picture cannot be read or has no caption, or
            the metadata is wrong.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{field}={folder!r} is no folder: give one with pictures and their captions.")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{field}={folder!r} holds no picture ({', '.join(SUFFIXES)}).")
    captions = {} if caption is not None else _read_metadata(root, field)
    found = []
    for path in paths:
        text = caption if caption is not None else captions.get(path.relative_to(root).as_posix(), _text_beside(path))
        if text is None:
            raise ValueError(
                f"{field}: {path} has no caption: name it in {root / METADATA}, write {path.with_suffix('.txt').name} "
                "beside it, or give one caption for all with data.caption."
            )
        pixels = np.asarray(read_image(path))
        found.append(
            CaptionedImage(path, text, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest())
        )
    return found


def _text_beside(path: Path) -> str | None:
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None


def _read_metadata(root: Path, field: str) -> dict[str, str]:
    """Captions by file name, from ``metadata.jsonl``; empty if there is no such file."""
    file = root / METADATA
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file}, line {number}, is not of the form {{"file_name": "dog.png", "text": "a dog"}}: correct it.'
            ) from error
        if not isinstance(name, str) or not isinstance(text, str) or not (root / name).is_file():
            raise ValueError(f"{field}: {file}, line {number}, names {name!r}, which is not in the folder: correct it.")
        captions[name] = text
    return captions


def digest(images: list[CaptionedImage]) -> str:
    """SHA-256 of the pictures and captions of a folder; it does not depend on their order or file names."""
    lines = sorted(f"{image.digest} {image.caption}" for image in images)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class CaptionItem(NamedTuple):  # as ``PictureItem``
    """One picture to generate from a caption, with its own seed.

    Attributes:
        prompt: The caption.
        kind: ``forget``, or ``keep`` if only pictures to keep have this caption.
        caption_index: Number of the caption; the captions of ``forget`` come first.
        image_index: Number of the picture among the pictures of this caption.
        number: Number of the picture among all pictures.
        seed: Seed of its noise.
    """

    prompt: str
    kind: Literal["forget", "keep"]
    caption_index: int
    image_index: int
    number: int
    seed: int


class CaptionItems(Dataset[CaptionItem]):
    """Every (caption, image), captions to forget first; image i of caption c has the seed ``seed + 100_000 i + c``."""

    def __init__(self, forget: list[str], keep: list[str], images_per_prompt: int, seed: int) -> None:
        captions: list[tuple[str, Literal["forget", "keep"]]] = [(caption, "forget") for caption in forget]
        captions += [(caption, "keep") for caption in keep]
        self.items = [
            CaptionItem(caption, kind, place, i, place * images_per_prompt + i, seed + 100_000 * i + place)
            for place, (caption, kind) in enumerate(captions)
            for i in range(images_per_prompt)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> CaptionItem:
        return self.items[index]


class PairSampler(Sampler[list[tuple[int, int, int]]]):
    """A rank's share of the batches of the current epoch, without the batches that a resumed epoch has already done."""

    def __init__(
        self, make: Callable[[], list[list[tuple[int, int, int]]]], steps: int, done: Callable[[], int]
    ) -> None:
        self.make, self.steps, self.done = make, steps, done

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return iter(self.make()[self.done() % self.steps :])

    def __len__(self) -> int:
        return self.steps


class _Same(Dataset[Any]):
    """Returns the index that the sampler gives."""

    def __getitem__(self, index: Any) -> Any:
        return index


class KeepForgetImages(L.LightningDataModule):
    """Pictures to keep and pictures to forget.

    ``fit`` yields batches (B, 3) of integers: the pair's position in the global batch, the picture x and the picture a.
    x is an index into X = keep + forget, a is an index into forget. The method decides whether x is drawn from all of
    X or only from keep. ``test`` yields lists of ``CaptionItem``.

    Args:
        keep: Folder of the pictures to keep, with captions in ``metadata.jsonl`` or text files.
        forget: Folder of the pictures to forget, likewise.
        held_out: Folder of pictures that the model has not seen and that resemble what it draws from the captions to
            forget: they show how close a picture comes to a picture to forget by chance. Null takes ``keep``.
        caption: One caption for all pictures, instead of their own.
        pairing: ``caption`` pairs a picture to forget only with pictures of the same caption, so that one prompt
            fits both; ``any`` pairs it with any picture.
        batch_size: Pairs in a step, over all processes.
        steps: Steps per epoch.
        images_per_prompt: Pictures of each caption in ``test``.
        keep_captions: How many captions of ``keep`` are drawn in ``test``, spread evenly over the folder.
        eval_batch_size: Pictures generated at once.
        seed: Seed of the order of the pairs and of the generated pictures.

    Raises:
        ValueError: A folder is missing or empty, a file in it cannot be read or has no caption, or a picture to forget
            is also in ``keep`` or ``held_out``.
    """

    def __init__(
        self,
        keep: str,
        forget: str,
        held_out: str | None = None,
        caption: str | None = None,
        pairing: Pairing = "caption",
        batch_size: int = 16,
        steps: int = 35,
        images_per_prompt: int = 8,
        keep_captions: int = 12,
        eval_batch_size: int = 40,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers(
            "data",
            batch_size=batch_size,
            steps=steps,
            images_per_prompt=images_per_prompt,
            eval_batch_size=eval_batch_size,
        )
        if keep_captions < 0:
            raise ValueError(f"data.keep_captions={keep_captions} must not be negative.")
        self.save_hyperparameters(logger=False)  # the logger merges them with the method's, which have a seed too
        self.keep_folder, self.forget_folder = keep, forget
        self.keep = read_folder(keep, "data.keep", caption)
        self.forget = read_folder(forget, "data.forget", caption)
        self.held_out = self.keep if held_out is None else read_folder(held_out, "data.held_out", caption)
        forgotten = {image.digest: image.path for image in self.forget}
        for image in (*self.keep, *self.held_out):
            if image.digest in forgotten:
                raise ValueError(
                    f"{image.path} shows the same picture as {forgotten[image.digest]}, which is to be forgotten: "
                    "remove one of them."
                )
        self.pairing, self.batch_size, self.steps, self.seed = pairing, batch_size, steps, seed
        self.images_per_prompt, self.eval_batch_size = images_per_prompt, eval_batch_size
        self.forget_captions = sorted({image.caption for image in self.forget})
        others = sorted({image.caption for image in self.keep} - set(self.forget_captions))
        count = min(keep_captions, len(others))
        self.keep_captions = [others[place * len(others) // count] for place in range(count)]
        self.groups = self._groups(self.keep)
        if pairing == "caption" and (lonely := sorted(set(self._groups(self.forget)) - set(self.groups))):
            raise ValueError(
                f"data.pairing='caption', but no picture in {keep} has the caption {lonely[0]!r}, which a picture to "
                "forget has: add one, or set data.pairing to any."
            )

    def _groups(self, images: list[CaptionedImage]) -> dict[str, list[int]]:
        """Indices of the pictures that may be paired, by caption; for ``any`` all pictures are one group."""
        groups: dict[str, list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(image.caption if self.pairing == "caption" else "", []).append(number)
        return groups

    def counts(self, number: int) -> tuple[int, int]:
        """For picture ``number`` of forget: n, the pictures of X in its group, and k, how many of them to forget."""
        group = self.forget[number].caption if self.pairing == "caption" else ""
        k = len(self._groups(self.forget)[group])
        return len(self.groups[group]) + k, k

    @property
    def identity(self) -> dict[str, Any]:
        """Identifies the pictures: the hash of each folder and its number of pictures."""
        return {
            "keep": {"sha256": digest(self.keep), "pictures": len(self.keep)},
            "forget": {"sha256": digest(self.forget), "pictures": len(self.forget)},
        }

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def pairs(self, epoch: int, from_all: bool) -> list[list[tuple[int, int, int]]]:
        """The global batches of an epoch, as (position, x, a); every picture is used once before one is used again.

        Args:
            epoch: Number of the epoch; each epoch has a different order.
            from_all: Whether x is drawn from X; otherwise it is drawn from keep.
        """
        seed = fit_plan_of(self.trainer).seed
        forget = _passes(list(range(len(self.forget))), seed, epoch, "forget")
        of_forget = self._groups(self.forget)
        keep = {}
        for name, numbers in of_forget.items():
            pool = self.groups[name] + ([len(self.keep) + number for number in numbers] if from_all else [])
            keep[name] = _passes(pool, seed, epoch, "keep", name)
        batches = []
        for _ in range(self.steps):
            batch = []
            for place in range(self.batch_size):
                a = next(forget)
                group = self.forget[a].caption if self.pairing == "caption" else ""
                batch.append((place, next(keep[group]), a))
            batches.append(batch)
        return batches

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs of a picture to keep and one to forget."""
        rank, world_size = self._share()
        if self.batch_size < world_size:
            raise ValueError(f"data.batch_size={self.batch_size} is less than the {world_size} processes: raise it.")
        from_all = fit_plan_of(self.trainer).draws_from_all

        def share() -> list[list[tuple[int, int, int]]]:
            epoch = self.trainer.current_epoch if self.trainer else 0
            return [batch[rank::world_size] for batch in self.pairs(epoch, from_all)]

        sampler = PairSampler(share, self.steps, self._steps_done)
        return DataLoader(_Same(), batch_sampler=sampler, collate_fn=torch.tensor)

    def _steps_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed if self.trainer else 0  # type: ignore[attr-defined]

    def _items(self, dataset: CaptionItems) -> DataLoader[Any]:
        sampler = RankSampler(list(range(len(dataset))), *self._share())
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=list)

    @property
    def test_items(self) -> list[CaptionItem]:
        """All pictures of a test, not only the share of this process."""
        return CaptionItems(self.forget_captions, self.keep_captions, self.images_per_prompt, self.seed).items

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """One picture of every caption to forget; nothing during a fit."""
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return self._items(CaptionItems(self.forget_captions, [], 1, self.seed))

    def test_dataloader(self) -> DataLoader[Any]:
        """Every caption to forget, and some of those to keep."""
        return self._items(CaptionItems(self.forget_captions, self.keep_captions, self.images_per_prompt, self.seed))

    def predict_dataloader(self) -> DataLoader[Any]:
        """As ``test_dataloader``."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch of tensors; caption items contain none."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx) if isinstance(batch, Tensor) else batch


def _passes(numbers: list[int], *key: object) -> Iterator[int]:
    """Endless passes through ``numbers``, each in a new random order; ``key`` is the seed."""
    generator = seeded(*key)
    while True:
        for place in torch.randperm(len(numbers), generator=generator).tolist():
            yield numbers[place]
