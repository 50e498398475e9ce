"""TensorBoard in a browser: what a person sees of two runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from helpers import Reddish, moved, score
from lit_unlearn.callbacks.evaluation import EvaluationReport
from lit_unlearn.evaluation.scores import Scores
from lit_unlearn.methods.value_refinement import ValueRefinement

RUNS = {"null_space/dog/version_0": 0.0, "esd/dog/version_0": 1.0}
"""Folder of a run to what its judge inclines to: no, or yes."""


class Biased(Reddish):
    """Answers on one side of a half, by the mean red of a picture."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = bias

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        return (super().__call__(images, questions) + self.bias) / 2


# What has a place on the page, also below shadow roots: texts [text, x, y of the middle], sizes of pictures, and the
# widths of lines in charts.
SEEN = """
const texts = [], pictures = [], curves = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) {
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (box.width && box.height) texts.push([node.textContent.trim(), box.x, box.y + box.height / 2]);
  } else if (node.nodeType === Node.ELEMENT_NODE) {
    const box = node.getBoundingClientRect();
    if (node.tagName === 'IMG' && box.width) pictures.push([node.naturalWidth, node.naturalHeight]);
    if (node.tagName === 'path' && node.classList.contains('line')) curves.push(box.width);
  }
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return [texts, pictures, curves];
"""


@pytest.fixture
def runs(refinement: Callable[..., ValueRefinement], tmp_path: Path) -> dict[str, Scores]:
    """Scores of two runs by their folder below ``tmp_path / "logs"``."""
    found = {}
    for run, bias in RUNS.items():
        logger = TensorBoardLogger(tmp_path / "logs", name=run.rpartition("/")[0], version=0, default_hp_metric=False)
        module = moved(refinement(), partial(Biased, bias))
        score(module, tmp_path, EvaluationReport(judge_negatives=6), logger=logger, images_per_prompt=3)
        logger.experiment.close()
        found[run] = Scores.load(tmp_path / "logs" / run / "scores.json")
    return found


@pytest.fixture
def board(tmp_path: Path) -> Iterator[str]:
    """Address of a TensorBoard of ``tmp_path / "logs"``."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs")]
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast=false"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, encoding="utf-8"
    ) as process:
        assert process.stderr is not None
        try:
            address = next(
                match.group() for line in process.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+/", line))
            )
            yield address
        finally:
            process.terminate()


def seen(browser: Any, address: str, texts: Sequence[str]) -> tuple[list[tuple[str, float, float]], list[Any]]:
    """Texts, and pictures or else lines, at ``address`` once all ``texts`` are there and nothing moves any more."""
    browser.get("about:blank")
    browser.get(address)
    before, end = None, time.monotonic() + 60
    while time.monotonic() < end:
        found = browser.execute_script(SEEN)
        if found == before and set(texts) <= {text for text, *_ in found[0]}:
            return [tuple(text) for text in found[0]], found[1] or found[2]
        before = found
        time.sleep(1)
    raise AssertionError(f"{set(texts) - {text for text, *_ in found[0]}} is not on the page of {address}")


def line(texts: list[tuple[str, float, float]], run: str) -> list[str]:
    """Texts of the row that begins with ``run``, from left to right."""
    ((_, _, middle),) = [text for text in texts if text[0] == run]
    return [text for text, _, y in sorted(texts, key=lambda text: text[1]) if abs(y - middle) < 5]


@pytest.mark.slow
def test_a_person_sees_runs_scores_pictures_and_the_judge(runs: dict[str, Scores], board: str, browser: Any) -> None:
    assert len({scores.forget for scores in runs.values()}) == 2
    texts, _ = seen(browser, board + "#hparams", [*RUNS, "Trial ID", "test/forget"])
    column = {text: x for text, x, _ in texts if text in ("edited", "test/forget")}
    assert column["edited"] < column["test/forget"]
    for run, scores in runs.items():
        row = line(texts, run)
        assert row[0] == run
        assert "dog" in row
        assert f"{scores.forget:#.5g}" in row
    texts, pictures = seen(browser, board + "#images", [*RUNS, "test/before_above_after"])
    assert len(pictures) == len(RUNS)
    assert all(width > 100 and height > 100 for width, height in pictures)
    texts, curves = seen(browser, board + "#pr_curves", [*RUNS, "judge/dog"])
    assert len(curves) == len(RUNS)
    assert min(curves) > 200
    assert {f"{run} is at" for run in RUNS} <= {text for text, *_ in texts}
