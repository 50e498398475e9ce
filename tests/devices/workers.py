"""The tests' end of ``worker.py``: starts a process for each kind of device when it is first asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PACKAGE = f"{os.sep}lit_unlearn{os.sep}"


@dataclass
class Answer:
    """What a worker says.

    Attributes:
        value: Exit codes of commands, or what a function returned.
        output: What was printed.
        error: ``type``, ``message`` and ``trace`` of an exception that nothing caught.
    """

    value: Any
    output: str
    error: dict[str, str] | None

    def succeeded(self, commands: int) -> bool:
        """Whether so many commands have all ended with 0."""
        return self.error is None and self.value == [0] * commands

    def __str__(self) -> str:
        if self.error is None:
            return f"exit codes {self.value}\n{self.output[-3000:]}"
        lines = self.error["trace"].splitlines()
        ours = [f"{at.strip()}: {line.strip()}" for at, line in pairwise(lines) if PACKAGE in at]
        return "\n".join([self.output[-1000:], *ours[-6:], f"{self.error['type']}: {self.error['message'][:1000]}"])


class Worker:
    """One process; ``kind`` is ``cpu``, ``float64`` or ``no_float64``."""

    def __init__(self, kind: str, **environment: str) -> None:
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, "-m", "devices.worker", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "PYTEST_XDIST_WORKER" in os.environ else None,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )

    def send(self, **request: Any) -> None:
        """Ask without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Answer:
        """The answer to the oldest question that has none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker {self.kind} has ended with {self.process.wait()}"
        answer = json.loads(line)
        return Answer(answer.get("value"), answer["output"], answer["error"])

    def ask(self, **request: Any) -> Answer:
        self.send(**request)
        return self.receive()

    def send_run(self, folder: Path, *commands: Sequence[Any], **stop: Any) -> None:
        """As ``run``, without waiting."""
        folder.mkdir(parents=True, exist_ok=True)
        self.send(folder=str(folder), run=[{"args": list(map(str, args)), **stop} for args in commands])

    def run(self, folder: Path, *commands: Sequence[Any], **stop: Any) -> Answer:
        """Run commands in ``folder``, until one fails; ``stop`` (``stop_at``, ``how``) is for all of them."""
        self.send_run(folder, *commands, **stop)
        return self.receive()

    def succeed(self, folder: Path, *commands: Sequence[Any]) -> str:
        """As ``run``; asserts that every command ends with 0, and returns what they print."""
        answer = self.run(folder, *commands)
        assert answer.succeeded(len(commands)), f"{self.kind}: {answer}"
        return answer.output

    def call(self, folder: Path, function: str, **arguments: Any) -> Any:
        """What ``function`` (``MODULE:NAME``) returns in the worker, under the device's mode."""
        answer = self.ask(folder=str(folder), call=function, arguments=arguments)
        assert answer.error is None, f"{self.kind}: {answer}"
        return answer.value

    def evaluate(self, expression: str) -> Answer:
        """The ``repr`` of an expression with ``torch`` and ``device``."""
        return self.ask(folder=str(TESTS), evaluate=expression)

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Workers:
    """A worker for each kind, started when it is first asked for."""

    def __init__(self) -> None:
        self._started: dict[str, Worker] = {}

    def __getitem__(self, kind: str) -> Worker:
        if kind not in self._started:
            self._started[kind] = Worker(kind)
        return self._started[kind]

    def stop(self) -> None:
        for worker in self._started.values():
            worker.stop()
