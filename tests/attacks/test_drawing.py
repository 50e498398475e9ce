from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel, Found
from lit_unlearn.attacks.drawing import AttackDrawing, judge_controls, result_name
from lit_unlearn.reports.attack_results import AttackReport, make_result

RUN = {"guidance_scale": 4, "num_inference_steps": 8}
CHOSEN = AttackDrawing.chosen


def test_what_the_attacker_does_not_choose_is_the_runs() -> None:
    how = CHOSEN(RUN, 0)
    assert how.settings == {
        "seed": 0,
        "num_inference_steps": 8,
        "guidance_scale": 4.0,
        "run_guidance_scale": 4.0,
        "negative_prompt": None,
    }
    assert how.words == ""
    assert CHOSEN(RUN, 0, 4.0) == how
    other = CHOSEN(RUN, 2, 7.5, "a cat")
    assert (other.guidance_scale, other.run_guidance_scale, other.negative_prompt) == (7.5, 4.0, "a cat")
    assert other.key == {"seed": 2, "guidance_scale": 7.5, "negative_prompt": "a cat"}
    assert other.words == " with seed 2, guidance 7.5, negative prompt 'a cat'"
    assert CHOSEN({}, 0).settings["num_inference_steps"] == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, None), "guidance_scale=-1.0 must be zero or larger; 1 means no guidance"),
        ((float("nan"), None), "guidance_scale=nan must be zero or larger"),
        ((None, " "), "negative_prompt=' ' is the empty prompt, which is used anyway: leave it out"),
        ((1.0, "a cat"), "negative_prompt='a cat' has no effect with guidance_scale=1, which means no guidance"),
    ],
)
def test_choices_without_an_effect(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CHOSEN(RUN, 0, *arguments)


def test_no_guidance_of_the_run_itself_has_no_negative_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no effect with guidance_scale=1"):
        CHOSEN({"guidance_scale": 1.0}, 0, None, "a cat")
    (tmp_path / "prompts.txt").touch()
    with pytest.raises(ValueError, match="is a file, which is not read"):
        CHOSEN(RUN, 0, None, str(tmp_path / "prompts.txt"))


def test_results_of_other_settings_have_other_names() -> None:
    empty = AttackReport(method="uce", concepts=["soccer ball"], checkpoint="last.ckpt", attacks=[])
    hows = [CHOSEN(RUN, seed, *rest) for seed in (0, 1) for rest in [(), (1.0,), (7.5, "a/b"), (None, "a_b")]]
    names = [result_name(empty, "relearning", "soccer ball", how) for how in hows]
    assert names[:2] == ["soccer_ball_relearning", "soccer_ball_relearning_guidance1"]
    assert names[4] == "soccer_ball_relearning_seed1"
    assert len({name.casefold() for name in names}) == len(names)
    assert not any("/" in name for name in names)


def test_files_of_earlier_versions_are_not_replaced() -> None:
    """Their names have no seed, so the first of another seed has to have one."""

    def report(**settings: Any) -> AttackReport:
        verdicts = {name: [False] for name in ("pre_attack", "shown", "unedited")}
        numbers: dict[str, Any] = {"pictures": 1, "seconds": 1.0, "unet_forwards": 1, "unet_backwards": 0}
        made = make_result(
            verdicts=verdicts, attack="relearning", concept="dog", found="x", settings=settings, **numbers
        )
        return AttackReport(method="uce", concepts=["dog"], checkpoint="last.ckpt", attacks=[made])

    how = CHOSEN(RUN, 0)
    assert result_name(report(seed=1), "relearning", "dog", how) == "dog_relearning_seed0"
    assert result_name(report(seed=0), "relearning", "dog", how) == "dog_relearning"
    assert result_name(report(seed=1, run_guidance_scale=4.0), "relearning", "dog", how) == "dog_relearning"
    assert result_name(report(seed=1), "ring_a_bell", "dog", how) == "dog_ring_a_bell"


def test_controls_without_answers_have_no_verdicts(attacked: Callable[..., AttackedModel]) -> None:
    class Half:
        name = "half"

        def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
            return torch.where(images.mean(dim=(1, 2, 3)) > 0.5, torch.nan, 1.0)

    model = attacked(judge=Half())
    bright, dark = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    controls = {"bright": lambda prompts, seeds: bright, "dark": lambda prompts, seeds: dark}
    pictures, verdicts = judge_controls(model, Found("", model.draw, controls=controls))  # type: ignore[arg-type]
    assert verdicts == {"bright": [], "dark": [True, True]}
    assert torch.equal(pictures["dark"], dark)
