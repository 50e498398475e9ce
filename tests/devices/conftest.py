"""Workers on the device and on the processor, and what they work on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import PETS
from torch.utils import backend_registration

from devices.recipes import Stock, more, teach, write_concepts
from devices.workers import Workers
from lit_unlearn.emoji.judge import JudgeTraining


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """A process for each kind of device."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} knows no device that is written in Python")
    started = Workers()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def stock(tiny_sd: Path, keep_forget: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stock:
    folder = tmp_path_factory.mktemp("stock")
    concepts = more(PETS, "owl", "castle")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        JudgeTraining(width=8).save_pretrained(folder / "judge")
    teach(folder / "judge", concepts)
    return Stock(
        model=tiny_sd,
        judge=folder / "judge",
        concepts=write_concepts(folder / "pets.yaml", PETS),
        more_concepts=write_concepts(folder / "more.yaml", concepts),
        keep_forget={**keep_forget, "held_out": keep_forget["keep"]},
    )
