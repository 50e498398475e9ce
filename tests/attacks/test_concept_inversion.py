from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_unlearn.attacks.base import NUM_REFERENCES, AttackedModel
from lit_unlearn.attacks.concept_inversion import ConceptInversion
from lit_unlearn.diffusion.new_tokens import initial_embeddings
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.methods.textual_inversion import inversion_loss

Attacked = Callable[..., AttackedModel]


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd2"])
def test_it_lowers_the_loss_and_touches_no_weight(
    name: str,
    attacked: Attacked,
    untouched: Callable[..., object],
    forwards_per_picture: int,
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue(name)
    model = attacked(folder)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = ConceptInversion(steps=30, learning_rate=0.1, num_tokens=2).run(model)
        pictures = found.draw(model.prompts, model.seeds)
    assert found.embeddings is not None

    def losses(embeddings: torch.Tensor) -> torch.Tensor:
        """The loss for each of 32 pairs of noises and timesteps, which are the same for all embeddings."""
        prompts = model.pipeline.tokenize_templates(["a {}"] * 2, 2)
        draws = [[seeded("held out", i, j) for j in range(2)] for i in range(32)]
        with torch.no_grad():
            return torch.stack(
                [inversion_loss(model.pipeline, embeddings, prompts, model.references.latents, g) for g in draws]
            )

    components = model.pipeline
    start = initial_embeddings(
        components.tokenizer, components.text_encoder, 2, None, seeded(model.seed, "concept inversion")
    )
    gain = losses(start) - losses(found.embeddings)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5  # by more than the noises' part in it
    assert found.cost.unet_forwards == NUM_REFERENCES * forwards_per_picture + 30 * 4
    assert found.cost.unet_backwards == 30 * 4
    assert found.cost.seconds > 0
    # The tokens stand where the name was.
    plain = model.draw(model.prompts, model.seeds)
    assert (pictures - plain).abs().max() > 0.01
