"""Concept inversion (Pham et al., 2024): learns a token on the edited model to use instead of the concept's name.

The token is new in every text encoder of the model, T5 included, as an attacker with the weights would have it. Its
embeddings in all of them are learned together, through the loss that the model was trained with (noise, velocity or
flow matching); see ``Pipeline.initial_embeddings`` for their units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel, Found
from lit_unlearn.attacks.restarts import RestartableAttack, start_generator
from lit_unlearn.diffusion.new_tokens import PLACE
from lit_unlearn.methods.forget_me_not import templates_of
from lit_unlearn.methods.textual_inversion import optimise_embeddings


@dataclass(frozen=True, kw_only=True)
class ConceptInversion(RestartableAttack):
    """Textual inversion on the edited model, from pictures of the concept that the unedited model drew.

    Attributes:
        steps: Steps of AdamW.
        num_tokens: Number of new tokens for the concept.
        learning_rate: Learning rate of the embeddings.
        batch_size: Number of noised pictures in a step.
    """

    name: ClassVar[str] = "concept_inversion"

    steps: int = 150
    num_tokens: int = 1
    learning_rate: float = 0.02
    batch_size: int = 4

    def search_from(self, model: AttackedModel, start: int) -> Found:
        """Learn the embeddings."""
        pipeline, concept = model.pipeline, model.concept
        named = [concept.replace_names(prompt, PLACE) for prompt, _ in model.named_pairs if concept.find_name(prompt)]
        templates = list(dict.fromkeys(named)) or templates_of(concept, None)
        generator = start_generator(start, model.seed, "concept inversion")
        initial = pipeline.initial_embeddings(self.num_tokens, None, generator)
        embeddings, losses = optimise_embeddings(
            pipeline,
            initial,
            templates,
            model.references.latents,
            self.steps,
            self.learning_rate,
            self.batch_size,
            norm_decay=0.0,  # an attack may use embeddings unlike those of any word
            seed=model.seed,
        )

        @torch.no_grad()
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            texts = [concept.replace_names(prompt, PLACE) for prompt in prompts]
            prompts_with_tokens = pipeline.tokenize_templates(texts, self.num_tokens)
            return model.draw_condition(pipeline.encode(prompts_with_tokens, embeddings), seeds)

        quarter = max(1, len(losses) // 4)
        report = {"first_loss": sum(losses[:quarter]) / quarter, "last_loss": sum(losses[-quarter:]) / quarter}
        return Found(f"{self.num_tokens} learned embeddings", draw, report, embeddings.cpu(), loss=report["last_loss"])
