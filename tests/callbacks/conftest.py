"""Callbacks on pipelines that are loaded once."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def loads_copies(loads_copies: None) -> None:
    """In every test of this folder."""
