"""A process that runs commands of lit-unlearn on one kind of device, so that imports are paid for once.

    python -m devices.worker cpu | float64 | no_float64

Requests come as lines of JSON on standard input, answers leave as lines on standard output; what commands print is
caught and is part of the answer. ``workers.py`` is the other end.

    {"folder": DIR, "run": [[ARG, ...], ...]}             commands, one after the other until one fails
    {"folder": DIR, "call": "MODULE:FUNCTION", "arguments": {...}}
    {"folder": DIR, "evaluate": EXPRESSION}               of torch, device and devices (``examples.py``)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import IO, Any

# Before any import of theirs.
os.environ.update(HF_DEACTIVATE_ASYNC_LOAD="1", TQDM_DISABLE="1")  # threads of the loader would not see the mode

import torch

from devices import examples

TRAINER = ("fit", "validate", "test", "predict")
GIVEN_A_DEVICE = ("generate", "attack")


class Killed(BaseException):
    """Ends a fit without any of Lightning's tidying up."""


def start(kind: str) -> tuple[Callable[[], AbstractContextManager[Any]], list[str], list[str]]:
    """Make this process one of ``kind``.

    Returns:
        The context to run everything under, and arguments for commands of the trainer and for others.
    """
    torch.set_num_threads(1)
    if kind == "cpu":
        from devices.accelerator import ON_PROCESSOR

        return nullcontext, ON_PROCESSOR, ["--device=cpu"]
    from devices import accelerator, pretend

    mode = pretend.register(has_float64=kind == "float64", index=int(os.environ.get("LOCAL_RANK", 0)))
    accelerator.register()
    return mode, accelerator.ON_DEVICE, [f"--device={pretend.NAME}"]


@contextmanager
def stopping(at: int | None, how: str) -> Iterator[None]:
    """Have fits stop before their step ``at``: by a ``signal``, as SLURM sends it, or ``kill``."""
    from lit_unlearn.callbacks.preemption import SaveOnSignal

    original = SaveOnSignal.on_train_batch_start

    def stop(self: SaveOnSignal, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.global_step == at:
            SaveOnSignal.on_train_batch_start = original  # once
            if how == "kill":
                raise Killed
            import signal

            os.kill(os.getpid(), signal.SIGUSR1)

    SaveOnSignal.on_train_batch_start = stop
    try:
        yield
    finally:
        SaveOnSignal.on_train_batch_start = original


@contextmanager
def caught() -> Iterator[IO[bytes]]:
    """What is printed, by C code too, in a file."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


class Worker:
    """Answers requests."""

    def __init__(self, kind: str) -> None:
        self.context, self.for_trainer, self.for_others = start(kind)
        self.device = torch.device("cpu") if kind == "cpu" else torch.device("pretend", 0)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        os.chdir(request["folder"])
        result: dict[str, Any] = {"error": None}
        with caught() as output:
            try:
                with self.context():
                    result["value"] = self.act(request)
            except BaseException as error:  # of any kind: the other end is told, and asserts what it should have been
                result["error"] = {"type": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
            sys.stdout.flush()
            sys.stderr.flush()
            output.seek(0)
            result["output"] = output.read().decode(encoding="utf-8", errors="replace")
        return result

    def act(self, request: dict[str, Any]) -> Any:
        if "run" in request:
            return [self.run(**command) for command in request["run"]]
        if "call" in request:
            module, _, name = request["call"].partition(":")
            return getattr(import_module(module), name)(**request["arguments"])
        names = {"torch": torch, "device": self.device, "devices": examples}
        return repr(eval(request["evaluate"], names))

    def run(self, args: list[str], stop_at: int | None = None, how: str = "signal") -> int:
        from lit_unlearn.cli import main

        name = args[0]
        extra = self.for_trainer if name in TRAINER else self.for_others if name in GIVEN_A_DEVICE else []
        context = nullcontext() if stop_at is None else stopping(stop_at, how)
        with context, contextlib.suppress(Killed):
            return main([*args, *extra])
        return -1


def main(kind: str) -> None:
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but answers goes to the other end
    sys.stdin = io.StringIO()
    worker = Worker(kind)
    for line in requests:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
