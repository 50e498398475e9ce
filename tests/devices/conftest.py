"""Workers on the device and on the processor, and what they work on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils import backend_registration

from devices.recipes import TRAININGS, Stock, more, prepare, small, teach, write_concepts
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
def stock(tiny_sd: Path, pets: str, keep_forget: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stock:
    folder = tmp_path_factory.mktemp("stock")
    two = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))["concepts"]
    concepts = more(two, "owl", "castle")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        JudgeTraining(width=8).save_pretrained(folder / "judge")
    teach(folder / "judge", concepts)
    return Stock(
        model=tiny_sd,
        judge=folder / "judge",
        concepts=Path(pets),
        more_concepts=write_concepts(folder / "more.yaml", concepts),
        keep_forget={**keep_forget, "held_out": keep_forget["keep"]},
    )


class Finished:
    """Recipes that were fitted and tested, each once on each kind of device; nothing is written to their folders."""

    def __init__(self, workers: Workers, stock: Stock, root: Path) -> None:
        self.workers, self.stock, self.root = workers, stock, root

    def folder(self, name: str, kind: str) -> Path:
        return self.root / kind / name

    def __call__(self, name: str, *kinds: str) -> list[Path]:
        """Folders of the recipe ``name`` on ``kinds``, which work at the same time."""
        asked = [kind for kind in kinds if not self.folder(name, kind).exists()]
        commands = ["fit"] if name in TRAININGS else ["fit", "test"]
        for kind in asked:
            folder = self.folder(name, kind)
            prepare(name, self.stock, folder)
            self.workers[kind].send_run(folder, *([command, *small(name, self.stock)] for command in commands))
        for answer, kind in [(self.workers[kind].receive(), kind) for kind in asked]:
            assert answer.succeeded(len(commands)), f"{name} on {kind}: {answer}"
        return [self.folder(name, kind) for kind in kinds]


@pytest.fixture(scope="session")
def finished(workers: Workers, stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(workers, stock, tmp_path_factory.mktemp("finished"))
