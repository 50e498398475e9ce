"""A control, not a method: it gives the concept's name another meaning, and does not unlearn anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.text import TextEncoder
from lit_unlearn.diffusion.vocabulary import TABLES
from lit_unlearn.methods.shared.concept_editor import ConceptEditor


class RenameTokens(ConceptEditor):
    """Gives the tokens of each concept's names the embeddings of its target's tokens, in every text encoder.

    It is a test of the evaluation: prompts that name the concept no longer draw it, but the model can still draw it.
    Prompts that describe the concept, and attacks, must reveal this.

    Args:
        edited_parameters: The embeddings of the vocabulary, of all text encoders or of some of them.
        **kwargs: See ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(self, edited_parameters: str = "embedding", **kwargs: object) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        self.targets_of_edited = [(concept, [(concept.name, concept.target)]) for concept in self.repaired]

    def select(self, names: Sequence[str]) -> list[str]:
        """The vocabularies' embedding tables.

        Raises:
            ValueError: The pattern selects another weight.
        """
        why = ": names are tokens, so set it to embedding."
        return self.select_only(names, lambda name: name.endswith(TABLES), why)

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch of one step."""
        return FitPlan(epochs=1, steps=1)

    def configure_model(self) -> None:
        """Load the pipeline, and enable the gradient of the embedding tables."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        for text in self.texts:
            text.table.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that changes nothing; it is needed since Lightning saves checkpoints only after its steps."""
        return torch.optim.SGD([text.table for text in self.texts], lr=0.0)

    @property
    def texts(self) -> list[TextEncoder]:
        """The text encoders whose table is edited."""
        parts = {name.split(".", 1)[0] for name in self.edited_names}
        return [text for text in self.pipeline.texts if text.part in parts]

    def renamed(self, text: TextEncoder) -> dict[int, int]:
        """Map each token of a concept's name to the target's token at the same place, or to the target's last one."""
        found: dict[int, int] = {}
        for concept, of_set in zip(self.repaired, self.edited, strict=True):
            target = text.words(concept.target or of_set.target)  # a token cannot become nothing
            for name in concept.names:
                for place, token in enumerate(text.words(name)):
                    found.setdefault(token, target[min(place, len(target) - 1)])
        return found

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Write the rows; the loss has no effect."""
        reported = {}
        for text in self.texts:
            renamed = self.renamed(text)
            name = next(name for name in self.edited_names if name.startswith(f"{text.part}."))
            with torch.no_grad():
                rows = self.pretrained.values[name][list(renamed.values())]
                text.table[list(renamed)] = rows.to(text.table)
            words, others = (text.names_of(ids) for ids in zip(*renamed.items(), strict=True))
            reported[text.part] = dict(zip(words, others, strict=True))
        self.report["renamed"] = reported if len(reported) > 1 else next(iter(reported.values()))
        return torch.stack([text.table.sum() for text in self.texts]).sum() * 0

    def on_train_epoch_end(self) -> None:
        """Report how much the weights have changed, before the checkpoint that contains the report."""
        self.report["weight_change_ratio"] = self.pretrained.change_ratio()
