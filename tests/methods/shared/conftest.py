"""Editors of the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_unlearn.methods.shared.concept_editor import ConceptEditor


@pytest.fixture
def editor(tiny_sd: Path, pets: str) -> Callable[..., ConceptEditor]:
    """Makes a ``ConceptEditor`` of the cross-attention of ``tiny_sd``, loaded unless told otherwise."""

    def build(load: bool = True, **arguments: Any) -> ConceptEditor:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 2}
        module = ConceptEditor(**{**defaults, **arguments})
        if load:
            module.configure_model()
        return module

    return build
