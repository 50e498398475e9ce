"""The judge of the embedded model: a classifier in the same folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lit_unlearn.diffusion.source import EMBEDDED, resolve_model
from lit_unlearn.judges.classifier import ClassifierJudge


class EmojiJudge(ClassifierJudge):
    """Answers the questions of ``emoji20`` about pictures of ``emoji-sd``; see ``ClassifierJudge``.

    Raises:
        ValueError: The classifier is missing beside the embedded model, or is corrupt.
    """

    short_name: ClassVar[str] = "emoji"

    def __init__(self) -> None:
        super().__init__(self.folder({}))

    @classmethod
    def folder(cls, options: Mapping[str, Any]) -> Path:
        """The folder ``judge`` beside the embedded model."""
        return Path(resolve_model(EMBEDDED)) / "judge"


class SecondEmojiJudge(EmojiJudge):
    """The second judge of ``emoji-sd``: the same questions, another architecture (a vision transformer)."""

    short_name: ClassVar[str] = "emoji_second"

    @classmethod
    def folder(cls, options: Mapping[str, Any]) -> Path:
        """The folder ``second_judge`` beside the embedded model."""
        return Path(resolve_model(EMBEDDED)) / "second_judge"
