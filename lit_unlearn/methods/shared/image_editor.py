"""Base of the methods that unlearn pictures: their data, and the test that looks for copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.data.images import CaptionedImage, CaptionItem, KeepForgetImages, load_image
from lit_unlearn.evaluation.memorisation import CopyCount, CopyDetector, Space, pixel_features
from lit_unlearn.judges.load import check_judge_name, load_judge
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY

PICTURE_BATCH = 32
"""Number of pictures that the autoencoder encodes or decodes at once."""


class ImageEditor(DiffusionEditor):
    """Base of the methods that unlearn pictures (``KeepForgetImages``), with the test that looks for copies.

    Args:
        judge: The judge in whose features copies are looked for: ``emoji`` (beside the embedded model), the folder of a
            classifier, or the import path of a class with ``features``; null looks in pixels only.
        copy_quantile: A generated picture counts as a copy if it is nearer to a picture to forget than all but this
            share of the held-out pictures.
        **kwargs: See ``DiffusionEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(self, judge: str | None = "emoji", copy_quantile: float = 0.01, **kwargs: object) -> None:
        if not 0 < copy_quantile < 1:
            raise ValueError(f"model.copy_quantile={copy_quantile} must lie between 0 and 1, e.g. 0.01.")
        if judge is not None and not hasattr(check_judge_name(judge, {}, None), "features"):
            raise ValueError(
                f"model.judge={judge!r} has no features in which copies could be looked for: take emoji, the folder of "
                "a classifier, or null for pixels alone."
            )
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.judge_path, self.copy_quantile = judge, copy_quantile

    @property
    def images(self) -> KeepForgetImages:
        """The run's data.

        Raises:
            ValueError: The run has another kind of data.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, KeepForgetImages):
            raise ValueError(
                f"{type(self).__name__} needs the pictures of KeepForgetImages, but data is {type(data).__name__}: "
                "set data to KeepForgetImages."
            )
        return data

    def encode_images(self, images: Sequence[CaptionedImage]) -> Tensor:
        """Latents (n, C, H, W) of ``images``, resized to the model's size."""
        parts = [images[start : start + PICTURE_BATCH] for start in range(0, len(images), PICTURE_BATCH)]
        size = self.pipeline.picture_size
        pictures = (torch.stack([load_image(image.path, size) for image in part]) for part in parts)
        return torch.cat([self.pipeline.encode_pictures(part) for part in pictures])

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store which pictures are unlearned."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["images"] = self.images.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other pictures.

        Raises:
            ValueError: The pictures do not match; the message says which.
        """
        super().on_load_checkpoint(checkpoint)
        ours = self.images.identity
        for name, theirs in checkpoint[CHECKPOINT_KEY]["images"].items():
            if theirs != ours[name]:
                raise ValueError(
                    f"The checkpoint was made with other pictures than those of data.{name} ({theirs['pictures']} "
                    f"there, {ours[name]['pictures']} here): give the folder that it was made with."
                )

    # --- test

    def spaces(self) -> dict[str, Space]:
        """Spaces in which distances between pictures are measured: pixels and, with a judge, its features."""
        spaces: dict[str, Space] = {"pixels": pixel_features}
        if self.judge_path is not None:
            self.judge = load_judge(self.judge_path, {}, None)
            spaces["features"] = self.judge.features  # type: ignore[attr-defined]
        return spaces

    def reconstructions(self, images: Sequence[CaptionedImage]) -> Tensor:
        """``images`` after the autoencoder, (n, 3, H, W) in [0, 1]: as the model would draw exact copies of them."""
        return torch.cat([self.pipeline.decode(part) for part in self.encode_images(images).split(PICTURE_BATCH)])

    def on_test_start(self) -> None:
        """Find the distances below which a picture counts as a copy."""
        keep = self.reconstructions(self.images.keep)
        has_held_out = self.images.held_out is not self.images.keep
        self.detector = CopyDetector(
            self.spaces(),
            self.reconstructions(self.images.forget),
            self.reconstructions(self.images.held_out) if has_held_out else keep,
            self.copy_quantile,
            keep if has_held_out else None,
        )
        self.before, self.after = self.copy_count(), self.copy_count()

    def copy_count(self) -> CopyCount:
        """An empty count of copies for the pictures of the test."""
        items = self.images.test_items
        return CopyCount(list(self.detector.spaces), [i.kind for i in items], len(self.images.forget)).to(self.device)

    def on_validation_start(self) -> None:
        """As ``on_test_start``."""
        self.on_test_start()

    def on_validation_epoch_end(self) -> None:
        """Log the shares of copies before and after the edit."""
        for prefix, metric in (("before", self.before), ("after", self.after)):
            for space, scores in metric.compute()["forget"].items():
                if isinstance(scores, dict):
                    self.log(f"validation/{prefix}/copies_{space}", scores["copies"])

    def test_step(self, batch: list[CaptionItem], batch_idx: int) -> dict[str, Tensor]:
        """Generate a batch with the pretrained and with the edited weights, from the same seeds, and look for copies.

        Returns:
            ``before`` and ``after``: pictures (B, 3, H, W), uint8; ``nearest_before`` and ``nearest_after``: number of
            the picture to forget that is nearest to each, (B,).
        """
        prompts, seeds = [item.prompt for item in batch], [item.seed for item in batch]
        after, before = self.generate(prompts, seeds), self.unedited_pictures(batch)
        outputs = {"before": before, "after": after}
        numbers = torch.tensor([item.number for item in batch])
        drift = (after.float() - before.float()).div(255).square().mean(dim=(1, 2, 3)).sqrt()
        for name, metric in (("before", self.before), ("after", self.after)):
            found = self.detector(outputs[name].float() / 255)
            metric.update(numbers, found, drift)
            outputs[f"nearest_{name}"] = found[self.detector.shown].nearest
        return outputs

    def validation_step(self, batch: list[CaptionItem], batch_idx: int) -> None:
        """As ``test_step``, on one picture of each caption to forget."""
        self.test_step(batch, batch_idx)

    def predict_step(self, batch: list[CaptionItem], batch_idx: int) -> Tensor:
        """Pictures (B, 3, H, W), uint8, of the edited model."""
        return self.generate([item.prompt for item in batch], [item.seed for item in batch])
