"""What ``ValueRefinement`` accepts, refuses, and selects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"edited_parameters": "layers.7.mlp"}, "edited_parameters='layers.7.mlp' selects no parameter"),
        ({"edited_parameters": "xattn"}, "only weights of text layers"),
        ({"edited_parameters": r"text_encoder.*fc2\.bias"}, "only weights of text layers"),
        ({"first_layer": 3}, r"model\.first_layer=3 .* leave no layer to edit: .* selects the layers 0 to 2"),
        ({"last_layer": 0}, r"last_layer=0 leave no layer to edit"),
        ({"rounds": 0}, r"model\.rounds=0 must be at least 1"),
        ({"latents_per_prompt": 0}, r"model\.latents_per_prompt=0 must be at least 1"),
        ({"min_timestep": -1}, "min_timestep=-1 .*0 <= min < max <= 1000"),
        ({"max_timestep": 1001}, "max_timestep=1001.*0 <= min < max <= 1000"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep=500 and max_timestep=500"),
        ({"concept": ["dog", "cat"]}, "concept=dog, cat leaves no prompt of pets to retain"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    arguments: dict[str, Any], problem: str, refinement: Refinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        refinement(**arguments)


def test_layers_are_edited_from_first_to_last(refinement: Refinement) -> None:
    module = refinement(first_layer=0, edited_parameters="text-fc1")
    module.configure_model()
    assert module.edited_names == [f"text_encoder.encoder.layers.{number}.mlp.fc1.weight" for number in range(3)]
    assert module.select([*reversed(module.edited_names)]) == module.edited_names
    assert module.values.shape == (2, 32, 128)
