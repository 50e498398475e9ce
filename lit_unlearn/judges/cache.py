"""Answers of a judge on disk, so that no picture is judged twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_unlearn.judges.base import Judge
from lit_unlearn.system.json_files import write_json


class CachedJudge:
    """A judge that remembers: answers lie in ``folder``, one file per judge, by picture and question.

    A picture is known by the hash of its 8-bit values. Answers of another judge, or of another version of this one (its
    ``name`` says which), are in another file. A failure (nan) is not kept: the judge is asked again the next time.

    Args:
        judge: Whom to ask.
        folder: Where answers are kept.
        version: Of the judge's weights, if its name does not say.

    Raises:
        ValueError: The file is not readable as answers of this judge.
    """

    def __init__(self, judge: Judge, folder: str | Path, version: str = "") -> None:
        self.judge, self.name = judge, judge.name
        key = hashlib.sha256(f"{judge.name} {version}".encode()).hexdigest()[:16]
        self.path = Path(folder).expanduser() / f"{key}.json"
        self.asked = 0
        self.answers: dict[str, float] = {}
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                if content["judge"] != judge.name:
                    raise ValueError(f"it holds answers of {content['judge']!r}")
                self.answers = {str(k): float(v) for k, v in content["answers"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.path} holds no answers of {judge.name!r} ({error}): delete it.") from error

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probability of "yes" (B,) for ``images`` (B, 3, H, W) in [0, 1], one question each."""
        keys = [picture_key(image, question) for image, question in zip(images, questions, strict=True)]
        missing = [place for place, key in enumerate(keys) if key not in self.answers]
        found = torch.tensor([self.answers.get(key, math.nan) for key in keys])
        if missing:
            self.asked += len(missing)
            answers = self.judge(images[missing], [questions[place] for place in missing]).float().cpu()
            for place, answer in zip(missing, answers.tolist(), strict=True):
                found[place] = answer
                if not math.isnan(answer):
                    self.answers[keys[place]] = answer
            write_json(self.path, {"judge": self.name, "answers": self.answers})
        return found


def picture_key(image: Tensor, question: str) -> str:
    """Hash of the 8-bit values of ``image`` (3, H, W) in [0, 1], of its size, and of ``question``."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().contiguous()
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {question} ".encode())
    digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()[:32]
