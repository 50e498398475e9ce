"""Keeps the answers of a judge on disk, so that no picture is judged twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_unlearn.diffusion.drawing import library_versions
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.judges.base import Judge
from lit_unlearn.system.json_files import read_json, read_value, write_json


class CachedJudge:
    """A judge that stores its answers in ``folder``, in one file per judge, by picture and question.

    A picture is identified by the hash of its 8-bit values. Answers of another judge, of another ``version`` of this
    judge, or with other versions of libraries are in another file. A missing answer (nan) is not stored, so the judge
    is asked again next time. If a file is damaged, a message is printed and a new file is begun.

    Args:
        judge: The judge to ask; its ``version``, if it has one, adds to its name.
        folder: Folder for the answers.
        version: Anything else that changes the answers, such as options and the code of a user's own class.
    """

    def __init__(self, judge: Judge, folder: str | Path, version: str = "") -> None:
        self.judge, self.name = judge, judge.name
        if hasattr(judge, "features"):
            self.features = judge.features
        if hasattr(judge, "ask"):
            self.ask = self._ask
        identity = {
            "judge": judge.name,
            "kind": f"{type(judge).__module__}.{type(judge).__qualname__}",
            "version": f"{getattr(judge, 'version', '')} {version}",
            "libraries": library_versions(),
        }
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path = Path(folder).expanduser() / f"{self.key[:16]}.json"
        self.asked = 0
        self.answers = self._read()

    def _read(self) -> dict[str, float]:
        if not self.path.is_file():
            return {}
        try:
            content = read_json(self.path, "a cache of answers is made when a judge is asked")
            answers = read_value(dict[str, float], content["answers"], "answers")
            if content["key"] != self.key or content["sha256"] != _hash(answers):
                raise ValueError(f"{self.path} holds other answers than those of {self.name!r}")
        except (ValueError, KeyError, TypeError) as error:
            rank_zero_info(f"The answers in {self.path} are damaged ({error}): the judge is asked again.")
            return {}
        return answers

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probability of "yes" (B,) for ``images`` (B, 3, H, W) in [0, 1], one question each."""
        return self._answered(
            images,
            range(len(images)),
            questions,
            lambda missing: self.judge(images[missing], [questions[place] for place in missing]),
        )

    def _ask(self, images: Tensor, rows: Sequence[int], questions: Sequence[str]) -> Tensor:
        """As ``ask`` of the judge: probability of "yes" (N,) for N ``questions`` about the pictures ``rows``."""

        def ask(missing: list[int]) -> Tensor:
            shown = {row: place for place, row in enumerate(dict.fromkeys(rows[place] for place in missing))}
            own = [shown[rows[place]] for place in missing]
            return self.judge.ask(images[list(shown)], own, [questions[place] for place in missing])  # type: ignore[attr-defined]

        return self._answered(images, rows, questions, ask)

    def _answered(
        self, images: Tensor, rows: Sequence[int], questions: Sequence[str], ask: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """Known answers (N,), and for the others what ``ask`` returns for the list of their places."""
        keys = [picture_key(images[row], question) for row, question in zip(rows, questions, strict=True)]
        missing = [place for place, key in enumerate(keys) if key not in self.answers]
        found = torch.tensor([self.answers.get(key, math.nan) for key in keys])
        if missing:
            self.asked += len(missing)
            answers = ask(missing).float().cpu()
            for place, answer in zip(missing, answers.tolist(), strict=True):
                found[place] = answer
                if not math.isnan(answer):
                    self.answers[keys[place]] = answer
            sha256 = _hash(self.answers)
            write_json(self.path, {"judge": self.name, "key": self.key, "sha256": sha256, "answers": self.answers})
        return found


def _hash(answers: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()


def weights_version(model: nn.Module) -> str:
    """Identifies a model of transformers: its commit on the hub, or a hash of its weights; then the device type."""
    commit = getattr(model.config, "_commit_hash", None)
    version = commit or fingerprint(dict(model.named_parameters()))
    return f"{version} {next(model.parameters()).device.type}"


def picture_key(image: Tensor, question: str) -> str:
    """Hash of the 8-bit values of ``image`` (3, H, W) in [0, 1], of its size, and of ``question``."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().contiguous()
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {question} ".encode())
    digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()[:32]
