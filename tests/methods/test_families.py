"""What a method cannot do with a family of models is said before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.forget_me_not import ForgetMeNot
from lit_unlearn.methods.rename_tokens import RenameTokens
from lit_unlearn.methods.robust_erasure import RobustErasure
from lit_unlearn.methods.textual_inversion import TextualInversion
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement, UNetValueRefinement

ONE_ENCODER: list[Any] = [ForgetMeNot, RenameTokens, RobustErasure, TextualInversion]
ONE_ENCODER += [UNetFeedForwardRefinement, UNetValueRefinement]


@pytest.mark.parametrize("kind", ONE_ENCODER)
@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd3"])
def test_methods_for_one_text_encoder_refuse_several(
    kind: Any, model: str, pets: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    with pytest.raises(ValueError, match=rf"text_encoder_2.*, and {kind.__name__} edits models with one text encoder"):
        kind(concept="dog", concept_set=pets, model=str(folder))


def test_what_needs_cross_attention_finds_none_in_a_transformer(pets: str, tiny_sd3: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(ValueError, match="edited_parameters='xattn' selects no parameter"):
        ESD(concept="dog", concept_set=pets, model=str(tiny_sd3))
    assert ESD(concept="dog", concept_set=pets, model=str(tiny_sdxl)).base.names
