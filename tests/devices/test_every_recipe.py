"""Every recipe does on a GPU what it does on the processor, whatever the command.

The recipes are read from ``configs``, so a new method is covered as soon as it has one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from devices.conftest import Finished
from devices.recipes import CONTENT, EDITS, TRAININGS, UNLEARNINGS, Stock, prepare, small
from devices.runs import (
    DESCENDING,
    TOLERANCE,
    assert_close,
    assert_same_gradients,
    assert_same_pictures,
    assert_same_scores,
    exported,
    pictures,
    run_folder,
    state,
    verdicts,
    weights,
)
from devices.workers import Answer, Workers
from helpers import load_once
from lit_unlearn.attacks.catalog import shipped_attacks
from lit_unlearn.cli import TOLD_TO_STOP

slow = (pytest.mark.slow, pytest.mark.exhaustive)
OF_EACH_METHOD = list({CONTENT[name]["model"]["class_path"]: name for name in reversed(EDITS)}.values())
"""The first recipe of each class: these are in the quick tests, on a device without float64."""
OF_EACH_KIND = [*OF_EACH_METHOD, "null_space_refined", "memit_descent", "concept_ablation_noise", "esd_2025"]
"""These, and recipes whose fits save something else than the first one of their class."""
LONG = ["emoji/text_to_image", "emoji/dit"]  # draw and encode each of 320 combinations


def each_kind(names: list[str], quick: list[str]) -> list[Any]:
    """Recipes on each kind of device: in the quick tests ``quick`` ones without float64; the rest takes minutes."""
    kinds = ("no_float64", "float64")
    return [
        pytest.param(name, kind, marks=() if name in quick and kind == kinds[0] else slow, id=f"{name}-{kind}")
        for name in names
        for kind in kinds
    ]


ATTACKED = [name for name in OF_EACH_METHOD if name not in (*UNLEARNINGS, "textual_inversion")]
"""What ``attack`` takes: an edit of weights, for a concept."""
GROWING = {"neg_grad": 1e-3}
"""How far losses of two runs may be apart where the method makes a loss grow, which amplifies rounding."""


def before(stock: Stock) -> dict[str, Any]:
    return {name: value.detach() for name, value in load_once(str(stock.model)).named_parameters().items()}


@pytest.mark.parametrize(("name", "kind"), each_kind(EDITS, quick=OF_EACH_METHOD))
def test_fit_and_test(name: str, kind: str, finished: Finished, stock: Stock) -> None:
    on_processor, on_device = finished(name, "cpu", kind)
    assert_close(weights(on_device), weights(on_processor), before(stock), DESCENDING.get(name, TOLERANCE))
    scores = verdicts(on_device)
    assert len(scores) == 1
    assert_same_scores(scores, verdicts(on_processor), GROWING.get(name, 1e-4))
    assert_same_pictures(pictures(on_device), pictures(on_processor))


@pytest.mark.parametrize(("name", "kind"), each_kind(TRAININGS, quick=[name for name in TRAININGS if name not in LONG]))
def test_trainings_of_the_embedded_model(name: str, kind: str, finished: Finished) -> None:
    on_processor, on_device = finished(name, "cpu", kind)
    assert state(on_device)["global_step"] == 2
    assert_same_gradients(on_device, on_processor)
    found, expected = (exported(folder / "checkpoints") for folder in (on_device, on_processor))
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize(("name", "kind"), each_kind(OF_EACH_METHOD, quick=[]))
def test_what_follows_a_fit(
    name: str, kind: str, finished: Finished, workers: Workers, stock: Stock, tmp_path: Path
) -> None:
    answers: dict[str, list[Answer]] = {}
    for place, folder in zip(("cpu", kind), finished(name, "cpu", kind), strict=True):
        shutil.copytree(folder, tmp_path / place)
        run = run_folder(folder).relative_to(folder)
        answers[place] = [workers[place].run(tmp_path / place, args) for args in following(name, run, stock)]
    for one, other in zip(answers["cpu"], answers[kind], strict=True):
        assert one.error is None and other.error is None, f"{one}\n\n{other}"
        assert one.value == other.value, f"{one}\n\n{other}"
    done = [answer.value == [0] for answer in answers[kind]]
    # Textual inversion changes no weight that could be exported.
    assert done == [True, True, *[name != "textual_inversion"] * (len(done) - 2)]
    assert_same_pictures(pictures(tmp_path / kind), pictures(tmp_path / "cpu"))
    assert_close(exported(tmp_path / kind), exported(tmp_path / "cpu"), {}, DESCENDING.get(name, TOLERANCE))
    assert_same_scores(verdicts(tmp_path / kind), verdicts(tmp_path / "cpu"), GROWING.get(name, 1e-4))


def following(name: str, run: Path, stock: Stock) -> list[list[Any]]:
    """What a person does with a run: looks at pictures, exports, attacks."""
    edit = ["--ckpt_path", run / "checkpoints/last.ckpt"]
    commands: list[list[Any]] = [
        ["validate", *small(name, stock)],
        ["predict", *small(name, stock)],
        ["generate", "one dog", "a cat", *edit, "--num_inference_steps", 1, "-o", "generated.png"],
        ["export", *edit, "-o", "pipeline"],
        ["export", *edit, "--delta", "-o", "delta"],
    ]
    if name in ATTACKED:
        attacks = list(shipped_attacks()) if name == ATTACKED[0] else ["concept_inversion"]
        few = ["--steps", 1, "--num_pictures", 2]
        # A picture that is drawn in one step is noised for that step.
        whole = ["--image_to_image.strength", 1, "--inpainting.strength", 1] if name == ATTACKED[0] else []
        commands.append(["attack", *edit, "--attacks", *attacks, *few, *whole])
    if name == ATTACKED[0]:
        variants = ["--prompt_search.per_prompt", "true", "--relearning.rank", 1, "--relearning.parts", "all"]
        variants += ["--restarts", 2]  # no pictures of others: the judge here sees the concept in all of them
        commands.append(["attack", *edit, "--attacks", "prompt_search", "relearning", *variants, *few])
    return commands


@pytest.mark.parametrize(("name", "kind"), each_kind([*OF_EACH_KIND, *TRAININGS], quick=[]))
def test_an_interrupted_fit_goes_on(
    name: str, kind: str, finished: Finished, workers: Workers, stock: Stock, tmp_path: Path
) -> None:
    (whole,) = finished(name, kind)
    prepare(name, stock, tmp_path)
    steps = state(whole)["global_step"]
    # A fit of one step has nothing to save before its end: it begins again.
    how, code = ("signal", TOLD_TO_STOP) if steps > 1 and name not in TRAININGS else ("kill", -1)
    answer = workers[kind].run(tmp_path, ["fit", *small(name, stock)], stop_at=0, how=how)
    assert answer.error is None and answer.value == [code], answer
    said = workers[kind].succeed(tmp_path, ["fit", *small(name, stock)])
    assert name in TRAININGS or "which was interrupted" in said
    assert state(tmp_path)["global_step"] == steps
    assert_close(weights(tmp_path), weights(whole), {}, DESCENDING.get(name, TOLERANCE))
