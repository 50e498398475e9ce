"""Base of the methods that edit concepts: their concepts, their judge, and the test with pictures of all concepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryCohenKappa

from lit_unlearn.data.concepts import Concept, load_concept_set
from lit_unlearn.data.cut_prompts import check_cuts
from lit_unlearn.data.pairs import edited_into, repaired, said_of
from lit_unlearn.data.prompts import PictureItem, edited_concepts, warn_of_edited_targets
from lit_unlearn.evaluation.metrics import ForgetRetain
from lit_unlearn.judges.base import Judge, is_quick, judge_questions
from lit_unlearn.judges.load import check_judge_name, load_cached_judge
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.system.errors import user_errors

KEPT_TEXTS = ("retain_prompts", "preserved", "retained_texts")
"""Where methods have the texts whose outputs should not change."""


def check_retained(prompts: Sequence[str], edited: Sequence[Concept], field: str = "retain") -> None:
    """Refuse prompts to retain that name an edited concept.

    Raises:
        ValueError: One does; the message has the prompt, the concept and the remedy.
    """
    for prompt in prompts:
        for concept in edited:
            if name := concept.find_name(prompt):
                raise ValueError(
                    f"model.{field} has {prompt!r}, which names the edited concept {concept.name!r} ({name!r}): take "
                    "it out, since what is edited cannot be kept."
                )


def pairs_of(concept: Concept) -> list[tuple[str, str]]:
    """Pairs of an edit prompt and its target prompt."""
    return list(zip(concept.edit_prompts, concept.target_prompts, strict=True))


class ConceptEditor(DiffusionEditor):
    """Base of the methods that edit concepts: their concepts, and the test with pictures of all concepts of a set.

    Args:
        concept: Name or names of the concepts to edit; set with ``--concept``.
        concept_set: Name of a shipped concept set or path of a YAML file; the same as the data's.
        judge: Short name of a judge (``emoji`` lies beside the embedded model), the folder of a classifier, or the
            import path of a class.
        judge_options: Arguments of the judge's class, such as ``{batch_size: 4}``.
        second_judge: Another judge of the same pictures, whose agreement with the first is measured; null for none.
        second_judge_options: Arguments of its class.
        judge_cache: Where answers of slow judges (all but classifiers) are kept; null keeps none.
        repair_pairs: Of several concepts, leave out pairs that name another edited one, and choose targets that are not
            edited (``lit_unlearn.data.pairs``); false takes the set's pairs as they are.
        earlier: Those of the concepts that an earlier run has edited; set with ``--after`` or ``--base_edit``. Scores
            say how many of them come back.
        retain_earlier: Leave them as the model has them that the fit starts from, and retain their prompts, except what
            has become a concept that is edited now; set with ``--base_edit``. False edits them again.
        spontaneous: Whether a test also asks the judge if pictures of retained prompts show the edited concepts, before
            and after: one question for each picture and edited concept. Null asks only quick judges (classifiers).
        **kwargs: See ``DiffusionEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    every_edited: list[Concept]
    """The concepts that the edited model should not draw any more, in the order of the edits."""
    new: list[Concept]
    """Those that no edit which the fit starts from has edited: all, if it starts from the base model."""
    edited_again: list[Concept]
    """Those that such an edit has made into one of ``new``."""
    edited: list[Concept]
    """Those that this fit edits: ``new`` and ``edited_again``."""
    repaired: list[Concept]
    """The same with the pairs to edit; see ``repair_pairs``."""
    targets_of_edited: Sequence[tuple[Concept, Sequence[tuple[str, str]]]] = ()
    """The edited concepts, each with pairs of a text and the one that a fit edits it into; empty without such."""
    changes_weights: ClassVar[bool] = True
    """Whether a fit edits weights of the model; else it only learns something about it."""
    asks_spontaneous: bool = False
    """Whether the judge is asked about edited concepts on pictures of retained prompts."""

    def __init__(
        self,
        concept: str | list[str],
        concept_set: str = "emoji20",
        judge: str = "emoji",
        judge_options: dict[str, Any] | None = None,
        second_judge: str | None = None,
        second_judge_options: dict[str, Any] | None = None,
        judge_cache: str | None = "logs/judged",
        repair_pairs: bool = True,
        earlier: list[str] | None = None,
        retain_earlier: bool = False,
        spontaneous: bool | None = None,
        **kwargs: object,
    ) -> None:
        self.concepts = load_concept_set(concept_set)
        self.every_edited = edited_concepts(concept, self.concepts)
        self.earlier = [item.name for item in edited_concepts(earlier, self.concepts)] if earlier else []
        if others := [name for name in self.earlier if name not in self.edited_labels]:
            raise ValueError(f"model.earlier names {others[0]!r}, which is not edited: take it out, or edit it too.")
        kept = [c for c in self.every_edited if retain_earlier and c.name in self.earlier]
        self.new = [c for c in self.every_edited if c not in kept]
        if not self.new:
            raise ValueError(f"concept={', '.join(self.edited_labels)} has nothing new to edit: name another concept.")
        self.edited_again = edited_into(kept, self.new, self.concepts) if repair_pairs else []
        own = [n for n, c in enumerate(self.every_edited) if c in self.new or c in self.edited_again]
        pairs = repaired(self.every_edited, self.concepts) if repair_pairs else self.every_edited
        self.edited, self.repaired = [self.every_edited[place] for place in own], [pairs[place] for place in own]
        self.retain_earlier = retain_earlier
        self.judge_path, self.judge_options, self.judge_cache = judge, judge_options or {}, judge_cache
        self.second_judge_path, self.second_judge_options = second_judge, second_judge_options or {}
        self.spontaneous = spontaneous
        check_judge_name(judge, self.judge_options, self.concepts)
        if second_judge is not None:
            if (second_judge, self.second_judge_options) == (judge, self.judge_options):
                raise ValueError(f"model.second_judge={second_judge!r} is the judge itself: name another, or null.")
            check_judge_name(second_judge, self.second_judge_options, self.concepts, field="second_judge")
        elif second_judge_options:
            raise ValueError("model.second_judge_options are of no judge: name one with model.second_judge.")
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if self.base.reader is not None:
            check_cuts(self.base.reader, self.concepts, self.edited)

    def configure_model(self) -> None:
        """As ``DiffusionEditor``; the prompts meet the tokens of a model from the hub only here.

        Raises:
            UserError: A prompt is cut so that it means nothing.
        """
        super().configure_model()
        if self.base.reader is None:
            with user_errors():
                check_cuts(self.pipeline.reader, self.concepts, self.edited)

    def prompts_to_retain(self, further: Sequence[str] | None) -> list[str]:
        """The edit prompts of the concepts that are not edited here, and the ``further`` ones of ``model.retain``.

        Raises:
            ValueError: One of ``further`` names an edited concept, or nothing is left.
        """
        check_retained(further or [], self.edited)
        if not (prompts := self.concepts.retain_prompts(self.own_labels) + list(further or [])):
            raise ValueError(
                f"concept={', '.join(self.own_labels)} leaves no prompt of {self.concepts.name} to retain: edit "
                "fewer concepts at once, or name what to keep in model.retain."
            )
        return prompts

    @property
    def edited_labels(self) -> list[str]:
        """Names of ``every_edited``."""
        return [concept.name for concept in self.every_edited]

    @property
    def new_labels(self) -> list[str]:
        """Names of ``new``."""
        return [concept.name for concept in self.new]

    @property
    def again_labels(self) -> list[str]:
        """Names of ``edited_again``."""
        return [concept.name for concept in self.edited_again]

    @property
    def own_labels(self) -> list[str]:
        """Names of ``edited``."""
        return [concept.name for concept in self.edited]

    @property
    def kept_texts(self) -> list[str]:
        """Texts whose outputs the method retains; empty if it retains none."""
        return next((list(getattr(self, name)) for name in KEPT_TEXTS if hasattr(self, name)), [])

    def setup(self, stage: str) -> None:
        """Before anything is loaded, say which pairs and targets are replaced, and which are edited all the same."""
        if stage == TrainerFn.FITTING:
            if self.edited_again:
                names, now = (", ".join(c.name for c in part) for part in (self.edited_again, self.new))
                rank_zero_info(f"Edited again, since an earlier edit may have made it what goes now ({now}): {names}.")
            if said := said_of(self.edited, self.repaired):
                rank_zero_info(said)
            warn_of_edited_targets(self.targets_of_edited)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store the concept set, as it was read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] |= {
            "concept_set_sha256": self.concepts.sha256,
            "concept_set": self.concepts.content(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuse a checkpoint of another concept set.

        Raises:
            ValueError: What differs.
        """
        super().on_load_checkpoint(checkpoint)
        ours = checkpoint[CHECKPOINT_KEY]
        if (sha256 := ours.get("concept_set_sha256")) is not None:
            self.concepts.check_same("The checkpoint", sha256, (ours.get("concept_set") or {}).get("name"))

    # --- test

    def load_judge(self) -> Judge:
        """Load the judge given as ``judge``."""
        return self._judge(self.judge_path, self.judge_options)

    def _judge(self, name: str, options: dict[str, Any]) -> Judge:
        # One file per process, since several write at the same time.
        folder = None if self.judge_cache is None else Path(self.judge_cache) / f"rank_{self.global_rank}"
        return load_cached_judge(name, options, self.concepts, folder)

    def on_test_start(self) -> None:
        """Make judge and metrics."""
        self.judge = self.load_judge()
        self.second_judge = None
        if self.second_judge_path is not None:
            self.second_judge = self._judge(self.second_judge_path, self.second_judge_options)
        self.asks_spontaneous = is_quick(self.judge) if self.spontaneous is None else self.spontaneous
        if self.spontaneous is None and not self.asks_spontaneous:
            rank_zero_info(
                f"The spontaneous rate is not measured, since the judge {self.judge.name!r} is slow: model.spontaneous="
                "true asks it about each edited concept on every picture of a retained prompt, before and after."
            )
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
            ``before`` and ``after``: pictures (B, 3, H, W), uint8; ``shown_before`` and ``shown_after``: the judge's
            answers about them, as ``score`` returns them.
        """
        prompts, seeds = [item.prompt for item in batch], [item.seed for item in batch]
        after = self.generate(prompts, seeds)
        before = self.unedited_pictures(batch)
        shown_before = self.score(self.before, before, batch)
        shown_after = self.score(self.after, after, batch)
        return {"before": before, "after": after, "shown_before": shown_before, "shown_after": shown_after}

    def score(self, metric: Metric, pictures: Tensor, batch: list[PictureItem]) -> Tensor:
        """Ask the judge about ``pictures`` (B, 3, H, W), uint8, and enter its answers.

        Returns:
            Whether each picture shows its prompt's concept, (B,): at least 0.5 for yes, NaN without an answer.
        """
        asked = list(self.questions(batch))
        own, shown = [item.question for item in batch], pictures.float() / 255
        texts = [own[row] if concept is None else concept.question for row, concept in asked]
        answers = judge_questions(self.judge, shown, texts, rows=[row for row, _ in asked])
        if (second := getattr(self, "second_judge", None)) is not None:
            first, others = answers[: len(batch)], judge_questions(second, shown, own)
            both = ~(first.isnan() | others.isnan())
            self.kappa.update(*((found[both] >= 0.5).int().to(self.device) for found in (first, others)))
        for concept in (None, *self.every_edited):
            places = [place for place, (_, other) in enumerate(asked) if other is concept]
            items = [batch[asked[place][0]] for place in places]
            metric.update(
                answers[places],
                [item.concept_index for item in items],
                [item.prompt_index for item in items],
                [item.image_index for item in items],
                concept and concept.name,
            )
        return answers[: len(batch)]

    def questions(self, batch: list[PictureItem]) -> Iterator[tuple[int, Concept | None]]:
        """What the judge is asked about the pictures of ``batch``: their rows with the concepts in question.

        First comes each picture's own concept, as None. Then come the edited concepts on the pictures of each other's
        prompts, and on those of retained prompts that do not name them if the spontaneous rate is measured.
        """
        yield from ((row, None) for row in range(len(batch)))
        concepts = list(self.concepts.concepts.values())
        for asked in self.every_edited:
            for row, item in enumerate(batch):
                own = concepts[item.concept_index]
                if own.name == asked.name or item.prompt_index >= len(own.prompts):
                    continue
                if own in self.every_edited or (self.asks_spontaneous and not asked.find_name(item.prompt)):
                    yield row, asked

    def on_validation_start(self) -> None:
        """Make judge and metrics."""
        self.judge, self.asks_spontaneous = self.load_judge(), False
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
