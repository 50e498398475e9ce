from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.memit import MEMIT
from lit_unlearn.methods.speed import SPEED
from lit_unlearn.methods.uce import UCE
from lit_unlearn.methods.uce_debias import UCEDebias
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement, UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.system.errors import UserError
from lit_unlearn.training.checks import check_edit, check_paths

WRITTEN = [ValueRefinement, UNetValueRefinement, UNetFeedForwardRefinement, MEMIT, UCE, UCEDebias, SPEED]
EDIT = {"class_path": "NullSpace", "init_args": {}}
OF_PYTHON: Any = {"class_path": "lit_unlearn.callbacks.closed_form.ClosedFormEdit", "init_args": {"solver": EDIT}}
REPORT: Any = {"class_path": "EvaluationReport"}


@pytest.mark.parametrize("method", WRITTEN)
@pytest.mark.parametrize("callbacks", [None, [], REPORT, [REPORT]])
def test_a_method_that_a_closed_form_writes_needs_one(method: type, callbacks: Any) -> None:
    check_edit(method, EDIT, callbacks)
    said = rf"^fit: {method.__name__} finds what to write, .* or pass --edit NullSpace\.$"
    with pytest.raises(UserError, match=said):
        check_edit(method, None, callbacks)


@pytest.mark.parametrize("callbacks", [OF_PYTHON, [OF_PYTHON], [REPORT, OF_PYTHON]])
def test_a_callback_of_the_recipe_will_do(callbacks: Any) -> None:
    check_edit(UCE, None, callbacks)


def test_a_method_that_trains_its_weights_has_none() -> None:
    check_edit(ESD, None, [REPORT])
    with pytest.raises(UserError, match=r"^fit: edit has no effect on ESD, which trains its weights: leave it out\.$"):
        check_edit(ESD, EDIT, None)


def test_home_is_expanded_in_the_paths_of_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = Namespace(ckpt_path="~/last.ckpt", trainer=Namespace(default_root_dir="~/runs"))
    check_paths(config)
    assert Path(config.ckpt_path) == tmp_path / "last.ckpt"
    assert Path(config.trainer.default_root_dir) == tmp_path / "runs"
    last = Namespace(ckpt_path="last", trainer=Namespace(default_root_dir=None))
    check_paths(last)
    assert (last.ckpt_path, last.trainer.default_root_dir) == ("last", None)
