"""Messages of jsonargparse and of our own checks come down to one sentence."""

from __future__ import annotations

import errno
import threading
import warnings
from pathlib import Path

import pytest

from lit_unlearn.system import errors
from lit_unlearn.system.errors import (
    UserError,
    closest,
    essence,
    parse_error,
    plain_threads,
    plain_warnings,
    user_errors,
)


class Base:
    def __init__(self, model: str = "", steps: int = 1) -> None: ...


class Method(Base):
    def __init__(self, rounds: int = 1, **kwargs: object) -> None: ...


CLASSES = {"Method": Method, "Base": Base}

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'package.Method':
        {reason}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {{'class_path': 'Method'}}"""


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            NESTED.format(reason="Option 'runds' is not accepted"),
            "model: Method has no option 'runds' (closest: rounds).",
        ),
        (
            NESTED.format(reason="Option 'rounds' is not accepted"),  # it passes the base a value of its own
            "model: Method sets 'rounds' itself: leave it out.",
        ),
        (NESTED.format(reason="Option 'step' is not accepted"), "model: Method has no option 'step' (closest: steps)."),
        (
            NESTED.format(reason="Parser key \"rounds\":\n          Expected a <class 'int'>. Got value: three"),
            "model.rounds: int expected, got three.",
        ),
        (
            NESTED.format(
                reason="Parser key \"rule\":\n          Expected a typing.Literal['max', 'mean']. Got value: men"
            ),
            "model.rule: one of ['max', 'mean'] expected, got men.",
        ),
        (
            'Parser key "model":\n  Errors:\n    - Expected a dot import path string: Metod',
            "model: there is no class or file 'Metod' (closest: Method).",
        ),
        (
            'Parser key "model":\n  Errors:\n    - Expected a dot import path string: Base',
            "model: Base is not of the kind that belongs here.",
        ),
        (
            "Parser key \"trainer.max_epochs\":\n  Errors:\n    - Expected a <class 'int'>\n  Given value: x",
            "trainer.max_epochs: int expected, got x.",
        ),
        (
            "Subcommand 'fit' does not accept option 'trainer.device'",
            "there is no key 'trainer.device' (closest: trainer.devices).",
        ),
        (
            "unrecognized arguments: --trainer.device 2",
            "there is no option --trainer.device (closest: trainer.devices).",
        ),
        (
            "unrecognized arguments: dog",
            "'dog' is not expected: several values are one list in quotes, as in --concept '[dog, cat]'.",
        ),
        (
            "the following arguments are required: fit.data, fit.model",
            "name a recipe that says what to run, e.g. --config null_space.yaml.",
        ),
    ],
)
def test_a_parser_message_is_reduced_to_its_reason(message: str, sentence: str) -> None:
    assert parse_error(message, CLASSES, ["trainer.devices", "trainer.max_epochs"]) == sentence


UNION = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [typing.Literal[64, 32], typing.Literal['bf16'], <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a typing.Literal['bf16']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: fp16"""
IN_BRACES = """Parser key "edit":

  - Expected a path but {class_path: Method, init_args: {runds: 1}} either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'Solver'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'package.Method':
        Option 'runds' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'Method', 'init_args': {'runds': 1}}"""
CALLABLE = """Parser key "optimizer":
          Type typing.Callable[[Iterable], Optimizer] expects a function or a callable class: Parser key "lr":

            - Expected a path but high either not accessible or invalid
            - Does not validate against any of the Union subtypes
            Subtypes: [<class 'float'>, <class 'torch.Tensor'>]
            Errors:
              - Expected a <class 'float'>
              - Expected a dot import path string: high
            Given value type: <class 'str'>
            Given value: high. Got value: Namespace(class_path='torch.optim.Adam', init_args=Namespace(lr='high'))"""


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (UNION, "trainer.precision: int or one of ['bf16'] expected, got fp16."),
        (IN_BRACES, "edit: Method has no option 'runds' (closest: rounds)."),
        (NESTED.format(reason=CALLABLE), "model.optimizer.lr: float expected, got high."),
    ],
)
def test_the_deepest_reason_is_the_one_that_was_meant(message: str, sentence: str) -> None:
    assert parse_error(message, CLASSES, []) == sentence


def test_essence_is_one_line_of_the_innermost_message() -> None:
    reason = ValueError("rounds=0 must be\n  at least 1.")
    wrapped = ValueError("Does not validate against any of the Union subtypes\nErrors: ...")
    wrapped.__cause__ = reason
    assert essence(wrapped) == "rounds=0 must be at least 1."
    listed = ValueError("Does not validate against any of the Union subtypes\nErrors:\n  - steps=0\n  - Expected None")
    listed.__cause__ = listed
    assert essence(listed) == "steps=0"


def test_only_value_errors_are_mistakes_of_the_user() -> None:
    with pytest.raises(UserError, match="too few"), user_errors():
        raise ValueError("too few")
    with pytest.raises(TypeError), user_errors():
        raise TypeError("ours")


def test_a_thread_that_cannot_write_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    seen: list[type[BaseException]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", outer := lambda args: seen.append(args.exc_type))
        with plain_threads():
            for error in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "?"), ValueError()):
                thread = threading.Thread(target=fail, args=(error,))
                thread.start()
                thread.join()
        assert threading.excepthook is outer
    assert capsys.readouterr().err == "lit-unlearn: warning: curves are not complete: No space left on device.\n"
    assert seen == [OSError, ValueError]


def test_our_warnings_are_plain_and_those_of_libraries_are_not() -> None:
    ours, theirs = errors.__file__, str(Path(warnings.__file__))
    before = warnings.formatwarning
    with plain_warnings():
        shown = warnings.formatwarning("It is so.", UserWarning, ours, 3)
        foreign = warnings.formatwarning("It is so.", UserWarning, theirs, 3)
    assert shown == "lit-unlearn: warning: It is so.\n"
    assert foreign == before("It is so.", UserWarning, theirs, 3) != shown
    assert warnings.formatwarning is before


def test_closest() -> None:
    assert closest("fti", ["fit", "test"]) == " (closest: fit)"
    assert closest("xyz", ["fit", "test"]) == ""
