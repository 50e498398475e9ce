"""What an edit costs: seconds and forwards, also over a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest

from helpers import checkpoint_of, load_into
from lit_unlearn.methods.shared.concept_editor import ConceptEditor

Editor = Callable[..., ConceptEditor]
TrainerWith = Callable[..., L.Trainer]


def test_a_fit_is_timed_and_what_comes_after_is_not(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 103.0, 105.0])
    monkeypatch.setattr("lit_unlearn.methods.shared.editor.time.perf_counter", lambda: next(clock))
    module = editor()
    module.generate(["a dog"], [0])  # before the fit
    assert module.current_cost() == {"seconds": 0, "unet_forwards": 0, "unet_backwards": 0, "peak_memory_bytes": 0}
    module.on_fit_start()
    module.generate(["a dog"], [0])
    during = module.current_cost()
    assert (during["seconds"], during["unet_forwards"]) == (3.0, 4)
    assert during["peak_memory_bytes"] > 1e7
    module.on_fit_end()
    module.generate(["a dog"], [0])
    after = module.current_cost()
    assert (after["seconds"], after["unet_forwards"]) == (5.0, 4)


def test_a_resumed_fit_adds_to_its_cost(editor: Editor, trainer_with: TrainerWith, pets: str, tmp_path: Path) -> None:
    module, resumed = editor(), editor()
    module.on_fit_start()
    module.generate(["a dog"], [0])
    load_into(resumed, checkpoint_of(module, trainer_with, pets, tmp_path / "edit.ckpt"))
    assert resumed.current_cost()["unet_forwards"] == 4
    resumed.on_fit_start()
    resumed.generate(["a dog", "a cat"], [0, 1])
    assert resumed.current_cost()["unet_forwards"] == 4 + 8
