"""The interface of judges, which look at pictures and answer yes-or-no questions about them."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.system.errors import UserError


@runtime_checkable
class Judge(Protocol):
    """Answers yes-or-no questions about pictures.

    Anything with a ``name`` and this call is a judge: a classifier with a head for each attribute, a zero-shot model,
    or a vision-language model that gets the question as text.
    """

    name: str
    """Names the judge in ``scores.json``, with its version: verdicts of two judges must not be mixed."""

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Return the probability that the answer is yes.

        Args:
            images: Pictures, (B, 3, H, W), float in [0, 1].
            questions: One question per picture, B of them.

        Returns:
            Probabilities, (B,), in [0, 1]; nan where the judge gave no clear answer.

        Raises:
            ValueError: The judge cannot answer a question.
        """
        ...


class JudgeError(UserError, ValueError):
    """A judge cannot be loaded, or returned something other than probabilities.

    It is a ``UserError``, because both can also happen during a test and the user can correct them.
    """


class UnknownQuestionError(JudgeError):
    """A judge cannot answer some questions.

    Args:
        judge: The judge's name for the user.
        unknown: The questions that it cannot answer, at least one.
        known: The questions that it can answer.
    """

    def __init__(self, judge: str, unknown: Sequence[str], known: Collection[str]) -> None:
        super().__init__(f"The judge {judge!r} cannot answer {unknown[0]!r}.")
        self.unknown, self.known = list(unknown), list(known)


class NamedJudge(ABC):
    """Base class of the judges with a short name for recipes; a judge that is given by its import path needs no base.

    ``judge_options`` are the arguments of the class. An argument called ``concepts`` receives the concept set. A judge
    may also have ``features(images)``, and ``ask(images, rows, questions)`` (see ``judge_questions``).
    """

    short_name: ClassVar[str]
    """Its name in recipes."""
    quick: ClassVar[bool] = False
    """Whether it is so quick that its answers need no cache and that it can be asked about many more pictures."""
    name: str
    """See ``Judge``."""

    @classmethod  # noqa: B027 - there may be nothing to refuse
    def check(cls, options: Mapping[str, Any], questions: Collection[str]) -> None:
        """Check options, questions and packages before anything is loaded; questions are checked before packages.

        Args:
            options: The arguments of the class that the user gave.
            questions: All questions that will be asked.

        Raises:
            UnknownQuestionError: The judge cannot answer a question.
            ValueError: An option is wrong, or a file or a package is missing.
        """

    @classmethod
    def questions_known(cls, options: Mapping[str, Any]) -> Mapping[str, str] | None:
        """The questions that it can answer, by the name of the concept they ask about; None if it takes any question.

        Args:
            options: The arguments of the class that the user gave.

        Raises:
            ValueError: An option is wrong, or a file is missing.
        """
        return None

    @abstractmethod
    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """See ``Judge``."""


def is_quick(judge: Judge) -> bool:
    """Whether ``judge`` is quick (see ``NamedJudge.quick``); False if it has no such attribute."""
    return getattr(judge, "quick", False)


def check_installed(package: str, what: str, extra: str) -> None:
    """Refuse if ``package`` is not installed.

    Args:
        package: Name of the package for ``import``.
        what: What needs the package; it begins the message.
        extra: The extra of this project that installs it.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}: pip install 'lit-unlearn[{extra}]'.")


def resolve_judge_model(model: str) -> str:
    """The folder or hub id that a judge's option ``model`` stands for.

    Raises:
        ValueError: ``model`` is neither a folder nor a hub id.
    """
    try:
        return str(resolve_model(model))
    except ValueError as error:
        raise ValueError(
            f"judge_options.model={model!r} is no folder and no hub id (owner/name): give the folder of a model that "
            "transformers can read, or its hub id."
        ) from error


@torch.no_grad()
def judge_questions(
    judge: Judge, images: Tensor, questions: Sequence[str], batch_size: int = 32, rows: Sequence[int] | None = None
) -> Tensor:
    """Ask ``judge`` questions about pictures, in batches, and check the inputs and the answers.

    A picture with values that are not finite (the model overflowed) is not shown to the judge and gets nan, because a
    broken picture does not show that a concept is gone.

    A judge with a method ``ask(images, rows, questions)``, which takes N questions and the rows of their pictures and
    returns (N,) probabilities, looks at each picture once for all its questions. Others see it once per question.

    Args:
        judge: The judge.
        images: Pictures, (B, 3, H, W), float in [0, 1]; B may be 0.
        questions: One question per picture, B of them; or with ``rows`` any number N.
        batch_size: Pictures that the judge sees at once.
        rows: The picture of each question, N of them; None asks one question about each picture.

    Returns:
        Probabilities of yes, (B,) or (N,), float32 on the CPU; nan where there is no answer.

    Raises:
        ValueError: Shapes, lengths or ranges of the inputs are wrong.
        JudgeError: The judge returned something other than probabilities.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; "
            "a judge looks at floating point pictures of shape (B, 3, H, W) in [0, 1]."
        )
    asked_once, rows = rows is None, range(len(images)) if rows is None else rows
    if isinstance(questions, str) or len(questions) != len(rows):
        count = "one text" if isinstance(questions, str) else f"{len(questions)} questions"
        raise ValueError(f"{count} for {len(rows)} pictures; give a list with one question per picture.")
    finite = images.isfinite().flatten(1).all(dim=1)
    wrong = finite & ((images < 0) | (images > 1)).flatten(1).any(dim=1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        low, high = (value.item() for value in images[index].aminmax())
        raise ValueError(
            f"Picture {index} has values from {low:.3g} to {high:.3g}; a judge looks at pictures in [0, 1]. "
            "Pictures in [-1, 1] become so by (images / 2 + 0.5).clamp(0, 1)."
        )
    places = [place for place, row in enumerate(rows) if finite[row]]
    ask = None if asked_once else getattr(judge, "ask", None)
    probability = torch.full((len(questions),), torch.nan, dtype=torch.float32)  # Lightning changes the default
    for batch in _batches(places, rows, batch_size, ask is not None):
        own, texts = [rows[place] for place in batch], [questions[place] for place in batch]
        if ask is None:
            answer = judge(images[own], texts)
        else:
            shown = {row: place for place, row in enumerate(dict.fromkeys(own))}
            answer = ask(images[list(shown)], [shown[row] for row in own], texts)
        if not isinstance(answer, Tensor) or answer.shape != (len(batch),):
            found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            what = "picture" if ask is None else "question"
            raise JudgeError(
                f"The judge {judge.name!r} returned {found} for {len(batch)} {what}s; it must "
                f"return one probability per {what}, a tensor of shape ({len(batch)},)."
            )
        answer = answer.float().cpu()
        if len(outside := answer[(answer < 0) | (answer > 1)]):
            raise JudgeError(f"The judge {judge.name!r} returned {outside[0].item():.4g}, which is not a probability.")
        probability[batch] = answer
    return probability


def _batches(places: Sequence[int], rows: Sequence[int], size: int, together: bool) -> list[list[int]]:
    """Divide ``places`` of questions into batches of ``size`` questions, or of all questions about ``size`` pictures.

    Args:
        places: Numbers of the questions.
        rows: The picture of each question.
        size: Size of a batch.
        together: Whether the questions about a picture belong together.
    """
    if not together:
        return [list(places[start : start + size]) for start in range(0, len(places), size)]
    of_pictures: dict[int, list[int]] = {}
    for place in places:
        of_pictures.setdefault(rows[place], []).append(place)
    found = list(of_pictures.values())
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    return [[place for own in part for place in own] for part in parts]
