"""Debiasing by Unified Concept Editing: pictures of a phrase should show each attribute as often as wished.

One epoch is one round. The target of a phrase is its own output plus α_a times the output of every attribute a. At the
end of an epoch the recipe's ``edit`` solves for these targets, from the pretrained weights. Then pictures of the
phrases are drawn and judged, and the next round moves α by the difference from the wished shares. The run ends when all
shares are near enough.

    epoch   α ← α + step (wished − measured)  ──►  v*, solve, write  ──►  pictures  ──►  measured
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.core.debiasing import attribute_ratios, debiasing_step
from lit_unlearn.core.subject_tokens import SubjectTokens
from lit_unlearn.core.uce import shifted_by_attributes
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.judges.base import judge_questions
from lit_unlearn.methods.uce import Mapped, PhraseMap, expanded
from lit_unlearn.system.names import check_numbers

DRAW_BATCH = 40
"""Number of pictures that are drawn at once."""


class UCEDebias(PhraseMap):
    """Balances attributes in the pictures of concepts; the concepts themselves are not erased.

    Args:
        attributes: Concepts of the set whose shares are balanced; the judge answers their questions. A picture counts
            for its most probable attribute.
        ratios: Wished shares, in the order of ``attributes``, or such a list for each edited concept by name; null
            takes equal shares.
        phrases: Phrase of each edited concept that is edited and drawn; null takes its name.
        attribute_template: Prompt of an attribute; ``{attribute}`` is its name, ``{phrase}`` the phrase.
        expand: Also edit and draw each phrase in a few templates ("a picture of {}").
        rounds: Largest number of rounds.
        step: How much α moves if a share is 1 below the wished one.
        tolerance: A share within this distance of the wished one is near enough.
        images_per_phrase: Pictures of each phrase in a round; each round has its own seeds.
        normalised: Scale the attributes' outputs to the norm of the phrase's outputs (code of 2023); false does not
            scale them (paper, code of 2025).
        tokens: As in ``UCE``.
        seed: Seed of the pictures.
        **kwargs: See ``PhraseMap`` and ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        attributes: list[str],
        ratios: list[float] | dict[str, list[float]] | None = None,
        phrases: list[str] | None = None,
        attribute_template: str = "{attribute}",
        expand: bool = False,
        rounds: int = 10,
        step: float = 0.25,
        tolerance: float = 0.1,
        images_per_phrase: int = 60,
        normalised: bool = True,
        tokens: SubjectTokens = "last_subject",
        seed: int = 0,
        **kwargs: object,
    ) -> None:
        super().__init__(tokens=tokens, **kwargs)  # type: ignore[arg-type]
        check_numbers("model", rounds=rounds, images_per_phrase=images_per_phrase)
        for field, number in {"step": step, "tolerance": tolerance}.items():
            if not 0 < number < float("inf"):
                raise ValueError(f"model.{field}={number} must be a positive number.")
        self.rounds, self.step, self.tolerance = rounds, step, tolerance
        self.images_per_phrase, self.normalised, self.seed = images_per_phrase, normalised, seed
        self.attributes = [self.concepts.get(name) for name in attributes]
        names = [attribute.name for attribute in self.attributes]
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"model.attributes={attributes}: name at least two concepts of the set, each once.")
        if both := [name for name in names if name in self.edited_labels]:
            raise ValueError(f"model.attributes has {both[0]!r}, which is an edited concept as well: take one out.")
        self.wished = self._wished(ratios)
        if "{attribute}" not in attribute_template:
            raise ValueError(f"model.attribute_template={attribute_template!r} must contain {{attribute}}.")
        if phrases is not None and len(phrases) != len(self.edited):
            raise ValueError(
                f"model.phrases has {len(phrases)} phrases for {len(self.edited)} concepts: give one for each, or null."
            )
        subjects = [concept.name for concept in self.edited] if phrases is None else phrases
        variants = [expanded([subject], "object") if expand else [subject] for subject in subjects]
        self.phrases = [phrase for found in variants for phrase in found]
        self.subject_of = torch.tensor([place for place, found in enumerate(variants) for _ in found])
        self.guides = [
            [attribute_template.format(attribute=name, phrase=phrase) for phrase in self.phrases] for name in names
        ]
        self.alphas = torch.zeros_like(self.wished)

    def _wished(self, ratios: list[float] | dict[str, list[float]] | None) -> Tensor:
        """Check and return the wished shares (P, A), float64."""
        count = len(self.attributes)
        given: dict[str, list[float]] = {}
        if isinstance(ratios, dict):
            given = {self.concepts.get(name).name: shares for name, shares in ratios.items()}
            if unknown := set(given) - set(self.own_labels):
                edited = ", ".join(self.own_labels)
                raise ValueError(
                    f"model.ratios has {sorted(unknown)[0]!r}, but the edited concepts are {edited}: take it out."
                )
        elif ratios is not None:
            given = dict.fromkeys(self.own_labels, ratios)
        for name, shares in given.items():
            if len(shares) != count or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise ValueError(
                    f"model.ratios={shares} of {name!r} must be {count} shares that sum to 1, one for each of "
                    f"{', '.join(attribute.name for attribute in self.attributes)}; null takes equal shares."
                )
        equal = [1 / count] * count
        return torch.tensor([given.get(name, equal) for name in self.own_labels], dtype=torch.float64)

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch of one step for each round."""
        return FitPlan(epochs=self.rounds, steps=1, seed=self.seed)

    # --- rounds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint and restore α."""
        super().on_load_checkpoint(checkpoint)
        if self.report.get("rounds"):
            self.alphas = torch.tensor(self.report["rounds"][-1]["alphas"], dtype=torch.float64)

    def on_fit_start(self) -> None:
        """Encode everything, and measure the unedited model."""
        super().on_fit_start()
        self.judge = self.load_judge()
        if not self.report.get("rounds"):
            self.report["rounds"] = []
            self.measure()
        elif len(self.report["rounds"]) > 1 and self.report["rounds"][-1]["largest_deviation"] <= self.tolerance:
            self.trainer.should_stop = True  # it was near enough, but was interrupted before it stopped

    def on_train_epoch_start(self) -> None:
        """Move α by the difference between wished and measured shares of the last round."""
        ratios = torch.tensor(self.report["rounds"][-1]["ratios"], dtype=torch.float64)
        self.alphas = debiasing_step(self.alphas, ratios, self.wished, self.step, self.tolerance)

    def targets(self, outputs: Tensor, guide_outputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """v* (m, d_out): the phrase's outputs plus α times the outputs of the attributes."""
        alphas = self.alphas[self.subject_of].to(outputs.device)
        return shifted_by_attributes(outputs, torch.stack(list(guide_outputs)), alphas, rows, self.normalised)

    def goal_states(self, mapped: Mapped) -> Tensor | None:
        """See ``PhraseMap.goal_states``: the phrase's state plus α times those of the attributes, if not scaled."""
        if self.normalised:
            return None
        alphas = self.alphas[self.subject_of].to(mapped.keys.device)
        return shifted_by_attributes(mapped.keys, torch.stack(mapped.guides), alphas, mapped.rows, normalised=False)

    def on_train_epoch_end(self) -> None:
        """Measure the shares after this round's edit, and end the run if they are near enough."""
        if self.measure() <= self.tolerance:
            self.trainer.should_stop = True

    def measure(self) -> float:
        """Draw and judge pictures of all phrases, report shares, and return the largest distance from a wish."""
        number = len(self.report["rounds"])
        answers = self.processes.made_once(
            self.images_per_phrase * len(self.edited), lambda rows: self._answers(rows, number)
        )
        answers = answers.unflatten(0, (len(self.edited), self.images_per_phrase)).cpu()  # (P, images, A + 1)
        ratios = torch.stack([attribute_ratios(found[:, :-1]) for found in answers])
        subjects = (answers[..., -1] >= 0.5).double().mean(1)
        deviation = float((ratios - self.wished).abs().max())
        self.report["rounds"].append(
            {
                "ratios": ratios.tolist(),
                "alphas": self.alphas.tolist(),
                "subject_shown": subjects.tolist(),
                "largest_deviation": deviation,
            }
        )
        self._log(ratios, subjects, deviation)
        return deviation

    def _answers(self, rows: list[int], number: int) -> Tensor:
        """The judge's probabilities (n, A + 1) of attributes and subject, for the pictures ``rows`` of a round."""
        answers = []
        for start in range(0, len(rows), DRAW_BATCH):
            places = [divmod(row, self.images_per_phrase) for row in rows[start : start + DRAW_BATCH]]
            prompts, seeds = [], []
            for subject, image in places:
                variants = [p for p, s in zip(self.phrases, self.subject_of.tolist(), strict=True) if s == subject]
                prompts.append(variants[image % len(variants)])
                seeds.append(self.seed + 1_000_000 * (number + 1) + 10_000 * subject + image)
            pictures = self.generate(prompts, seeds).float() / 255
            questions = [[attribute.question] * len(places) for attribute in self.attributes]
            questions.append([self.edited[subject].question for subject, _ in places])
            answers.append(torch.stack([judge_questions(self.judge, pictures, asked) for asked in questions], dim=1))
        return torch.cat(answers)

    def _log(self, ratios: Tensor, subjects: Tensor, deviation: float) -> None:
        """Log the shares of every phrase, as curves over the rounds."""
        if self.trainer.logger is None:
            return
        metrics = {"debias/largest_deviation": deviation}
        for concept, shares, shown in zip(self.edited, ratios.tolist(), subjects.tolist(), strict=True):
            metrics[f"debias/{concept.name}/subject_shown"] = shown
            for attribute, share in zip(self.attributes, shares, strict=True):
                metrics[f"debias/{concept.name}/{attribute.name}"] = share
        self.trainer.logger.log_metrics(metrics, step=len(self.report["rounds"]) - 1)
