"""Base of the methods that edit concepts: their concepts, their judge, and the test with pictures of all concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryCohenKappa

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import PictureItem, edited_concepts
from lit_unlearn.evaluation.metrics import ForgetRetain
from lit_unlearn.judges.base import Judge, judge_questions
from lit_unlearn.judges.cache import CachedJudge
from lit_unlearn.judges.classifier import ClassifierJudge
from lit_unlearn.judges.load import check_judge_name, load_judge
from lit_unlearn.methods.shared.editor import CHECKPOINT_KEY, DiffusionEditor


class ConceptEditor(DiffusionEditor):
    """Base of the methods that edit concepts: their concepts, and the test with pictures of all concepts of a set.

    Args:
        concept: Name or names of the concepts to edit; set with ``--concept``.
        concept_set: Name of a shipped concept set or path of a YAML file; the same as the data's.
        judge: ``emoji`` (beside the embedded model), ``llava``, ``clip``, ``nudenet``, or a folder with a classifier.
        judge_options: Arguments of ``llava``, ``clip`` or ``nudenet``, such as ``{batch_size: 4}``.
        second_judge: Another judge of the same pictures, to measure how often both give the same answer; null for none.
        judge_cache: Folder that keeps the answers of slow judges (all except classifiers); null keeps none.
        **kwargs: See ``DiffusionEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        concept: str | list[str],
        concept_set: str = "emoji20",
        judge: str = "emoji",
        judge_options: dict[str, Any] | None = None,
        second_judge: str | None = None,
        judge_cache: str | None = "logs/judged",
        **kwargs: object,
    ) -> None:
        self.concepts = load_concept_set(concept_set)
        self.edited = edited_concepts(concept, self.concepts)
        self.judge_path, self.judge_options, self.judge_cache = judge, judge_options or {}, judge_cache
        self.second_judge_path = second_judge
        check_judge_name(judge, self.judge_options, self.concepts)
        if second_judge is not None:
            if second_judge == judge:
                raise ValueError(f"model.second_judge={second_judge!r} is the same as judge: name another, or null.")
            check_judge_name(second_judge, {}, self.concepts)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    @property
    def edited_labels(self) -> list[str]:
        """Names of the edited concepts."""
        return [concept.name for concept in self.edited]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store the concept set, as it was read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] |= {
            "concept_set_sha256": self.concepts.sha256,
            "concept_set": self.concepts.content(),
        }

    # --- test

    def load_judge(self) -> Judge:
        """Load the judge given as ``judge``."""
        return self._judge(self.judge_path, self.judge_options)

    def _judge(self, name: str, options: dict[str, Any]) -> Judge:
        judge = load_judge(name, options, self.concepts)
        slow = not isinstance(judge, ClassifierJudge) and self.judge_cache is not None
        # One file per process, since several write at the same time.
        folder = Path(self.judge_cache or "") / f"rank_{self.global_rank}"
        return CachedJudge(judge, folder) if slow else judge

    def on_test_start(self) -> None:
        """Make judge and metrics."""
        self.judge = self.load_judge()
        self.second_judge = self._judge(self.second_judge_path, {}) if self.second_judge_path else None
        self.kappa = BinaryCohenKappa().to(self.device)
        images_per_prompt = self.trainer.datamodule.images_per_prompt  # type: ignore[attr-defined]
        self.before, self.after = self.metric(images_per_prompt), self.metric(images_per_prompt)

    def metric(self, images_per_prompt: int) -> ForgetRetain:
        """An empty metric for ``images_per_prompt`` pictures of every evaluation prompt."""
        # On the device of the weights, since processes on GPUs can only exchange tensors there.
        counts = self.concepts.counts
        names = self.edited_labels
        return ForgetRetain(
            list(self.concepts.concepts),
            names,
            images_per_concept=(counts.direct + counts.indirect) * images_per_prompt,
            num_direct=counts.direct,
            images_per_prompt=images_per_prompt,
            adjacent=self.concepts.adjacent(names),
            num_adversarial=max(len(concept.adversarial) for concept in self.concepts.concepts.values()),
        ).to(self.device)

    def test_step(self, batch: list[PictureItem], batch_idx: int) -> dict[str, Tensor]:
        """Generate, judge and score a batch with the pretrained and with the edited weights, from the same seeds.

        Returns:
            ``before`` and ``after``: pictures (B, 3, H, W), uint8.
        """
        prompts, seeds = [item.prompt for item in batch], [item.seed for item in batch]
        after = self.generate(prompts, seeds)
        before = self.unedited_pictures(batch)
        self.score(self.before, before, batch)
        self.score(self.after, after, batch)
        return {"before": before, "after": after}

    def score(self, metric: Metric, pictures: Tensor, batch: list[PictureItem]) -> None:
        """Ask the judge about ``pictures`` (B, 3, H, W), uint8, and enter its answers."""
        questions = [item.question for item in batch]
        answers = judge_questions(self.judge, pictures.float() / 255, questions)
        if (second := getattr(self, "second_judge", None)) is not None:
            others = judge_questions(second, pictures.float() / 255, questions)
            both = ~(answers.isnan() | others.isnan())
            self.kappa.update(*((found[both] >= 0.5).int().to(self.device) for found in (answers, others)))
        metric.update(
            answers,
            [item.concept_index for item in batch],
            [item.prompt_index for item in batch],
            [item.image_index for item in batch],
        )

    def on_validation_start(self) -> None:
        """Make judge and metrics."""
        self.judge = self.load_judge()
        self.before, self.after = self.metric(1), self.metric(1)

    def validation_step(self, batch: list[PictureItem], batch_idx: int) -> None:
        """As ``test_step``, on the few pictures of the data's ``val_dataloader``."""
        self.test_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the scores before and after the edit."""
        for prefix, metric in (("before", self.before), ("after", self.after)):
            scores = metric.compute()
            self.log_dict(
                {f"validation/{prefix}/{name}": scores[name] for name in ("forget", "retain", "harmonic_mean")}
            )

    def predict_step(self, batch: list[PictureItem], batch_idx: int) -> Tensor:
        """Pictures (B, 3, H, W), uint8, of the edited model."""
        return self.generate([item.prompt for item in batch], [item.seed for item in batch])
