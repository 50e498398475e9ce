"""What a judge is: something that looks at pictures and answers yes-or-no questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Judge(Protocol):
    """Answers whether a picture shows what is asked.

    Anything with a ``name`` and this call is a judge: a classifier with a head for each attribute, a zero-shot model,
    a vision-language model that is asked the question literally.
    """

    name: str
    """Names the judge in ``scores.json``, with its version: verdicts of two judges must not be mixed."""

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Return the probability that the answer is yes.

        Args:
            images: Pictures, (B, 3, H, W), float in [0, 1].
            questions: One question per picture, B of them.

        Returns:
            Probabilities, (B,), in [0, 1]; nan where the judge could not tell (no answer, not yes or no).

        Raises:
            ValueError: A question that this judge does not know.
        """
        ...


@torch.no_grad()
def judge_questions(judge: Judge, images: Tensor, questions: Sequence[str], batch_size: int = 32) -> Tensor:
    """Ask ``judge`` one question about each picture, in batches, and check what goes in and what comes out.

    A picture with numbers that are not finite (a model that overflowed) is not shown to the judge: it gets nan, since
    a broken picture is no evidence that a concept is gone.

    Args:
        judge: The judge.
        images: Pictures, (B, 3, H, W), float in [0, 1]; B may be 0.
        questions: One question per picture, B of them.
        batch_size: Pictures that the judge sees at once.

    Returns:
        Probabilities of yes, (B,), float32 on the CPU; nan where there is no judgement.

    Raises:
        ValueError: Shapes, lengths or ranges do not fit, or the judge returned something else than probabilities.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; "
            "a judge looks at floating point pictures of shape (B, 3, H, W) in [0, 1]."
        )
    if isinstance(questions, str) or len(questions) != len(images):
        count = "one text" if isinstance(questions, str) else f"{len(questions)} questions"
        raise ValueError(f"{count} for {len(images)} pictures; give a list with one question per picture.")
    finite = images.isfinite().flatten(1).all(dim=1)
    wrong = finite & ((images < 0) | (images > 1)).flatten(1).any(dim=1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        low, high = (value.item() for value in images[index].aminmax())
        raise ValueError(
            f"Picture {index} has values from {low:.3g} to {high:.3g}; a judge looks at pictures in [0, 1]. "
            "Pictures in [-1, 1] become so by (images / 2 + 0.5).clamp(0, 1)."
        )
    shown = finite.nonzero().flatten().tolist()
    probability = torch.full((len(images),), torch.nan)
    for start in range(0, len(shown), batch_size):
        batch = shown[start : start + batch_size]
        answer = judge(images[batch], [questions[index] for index in batch])
        if answer.shape != (len(batch),):
            raise ValueError(
                f"The judge {judge.name!r} returned shape {tuple(answer.shape)} for {len(batch)} pictures; "
                f"it must return one probability per picture, shape ({len(batch)},)."
            )
        answer = answer.float().cpu()
        if len(outside := answer[(answer < 0) | (answer > 1)]):
            raise ValueError(f"The judge {judge.name!r} returned {outside[0].item():.4g}, which is no probability.")
        probability[batch] = answer
    return probability
