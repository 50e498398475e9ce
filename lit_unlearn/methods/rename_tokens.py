"""A control, not a method: it gives the concept's name another meaning, and does not unlearn anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.methods.shared.concept_editor import ConceptEditor


class RenameTokens(ConceptEditor):
    """Gives the tokens of each concept's names the embeddings of its target's tokens.

    It is a test of the evaluation: prompts that name the concept no longer draw it, but the model can still draw it.
    Prompts that describe the concept, and attacks, must reveal this.

    Args:
        edited_parameters: The embeddings of the vocabulary.
        **kwargs: See ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    one_text_encoder: ClassVar[bool] = True

    def __init__(self, edited_parameters: str = "embedding", **kwargs: object) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        self.targets_of_edited = [(concept, [(concept.name, concept.target)]) for concept in self.repaired]

    def select(self, names: Sequence[str]) -> list[str]:
        """The vocabulary's embedding table.

        Raises:
            ValueError: The pattern selects another weight.
        """
        why = ": names are tokens, so set it to embedding."
        return self.select_only(names, lambda name: name.endswith("token_embedding.weight"), why)

    @property
    def fit_plan(self) -> FitPlan:
        """One epoch of one step."""
        return FitPlan(epochs=1, steps=1)

    def configure_model(self) -> None:
        """Load the pipeline, and enable the gradient of the embedding table."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        self.pipeline.text.table.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that changes nothing; it is needed since Lightning saves checkpoints only after its steps."""
        return torch.optim.SGD([self.pipeline.text.table], lr=0.0)

    def renamed(self) -> dict[int, int]:
        """Map each token of a concept's name to the target's token at the same place, or to the target's last one."""
        text = self.pipeline.text
        found: dict[int, int] = {}
        for concept, of_set in zip(self.repaired, self.edited, strict=True):
            target = text.words(concept.target or of_set.target)  # a token cannot become nothing
            for name in concept.names:
                for place, token in enumerate(text.words(name)):
                    found.setdefault(token, target[min(place, len(target) - 1)])
        return found

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Write the rows; the loss has no effect."""
        renamed = self.renamed()
        before = self.pretrained.values[self.edited_names[0]]
        with torch.no_grad():
            table = self.pipeline.text.table
            table[list(renamed)] = before[list(renamed.values())].to(table)
        words, others = (self.pipeline.text.names_of(ids) for ids in zip(*renamed.items(), strict=True))
        self.report["renamed"] = dict(zip(words, others, strict=True))
        return table.sum() * 0

    def on_train_epoch_end(self) -> None:
        """Report how much the weights have changed, before the checkpoint that contains the report."""
        self.report["weight_change_ratio"] = self.pretrained.change_ratio()
