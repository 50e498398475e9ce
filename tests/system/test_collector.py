"""The garbage collector while a command starts, works and ends."""

from __future__ import annotations

import gc
import subprocess
import sys

from lit_unlearn import cli
from lit_unlearn.system.collector import RARELY, collect_as_usual, collecting_rarely

PROCESS = """
import gc
from lit_unlearn.system.collector import collecting_rarely

class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("walked")

with collecting_rarely():
    cycle = Cycle()
del cycle
"""


def test_it_is_rare_within_until_the_imports_are_over() -> None:
    before = gc.get_threshold()
    with collecting_rarely():
        assert gc.get_threshold() == RARELY != before
        collect_as_usual()
        assert gc.get_threshold() == before
    assert gc.get_threshold() == before


def test_it_is_as_before_after_an_error() -> None:
    before = gc.get_threshold()
    assert cli.main(["fit", "--config", "there_is_none.yaml"]) == 2
    assert gc.get_threshold() == before


def test_outside_nothing_changes() -> None:
    before = gc.get_threshold()
    gc.set_threshold(701, 11, 12)  # a program's own choice, beside our functions
    try:
        collect_as_usual()
        assert gc.get_threshold() == (701, 11, 12)
    finally:
        gc.set_threshold(*before)


def test_the_process_ends_without_a_walk() -> None:
    def said(script: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, encoding="utf-8"
        )
        return done.stdout.strip()

    assert said(PROCESS) == ""
    assert said(PROCESS.replace("with collecting_rarely():", "if True:")) == "walked"
