"""A judge that is a small classifier with one head per attribute of a picture; each question belongs to one head.

The judge of the embedded model is of this kind. Its ``config.json`` lists the heads and the questions they answer, so
that nothing in this class depends on emoji.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_unlearn.judges.base import NamedJudge, UnknownQuestionError
from lit_unlearn.system.devices import find_device

Architecture = Literal["convolution", "transformer"]


class PatchTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al., 2021) without a class token, on pictures scaled to 48 × 48.

    Args:
        dim: Width of a token; a token is a patch of 6 × 6 pixels.
        depth: Number of layers.
    """

    def __init__(self, dim: int, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 6, stride=6)
        self.positions = nn.Parameter(0.02 * torch.randn(64, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens as a map (B, dim, 8, 8) of ``images`` (B, 3, H, W)."""
        if images.shape[-2:] != (48, 48):
            images = F.interpolate(images, (48, 48), mode="bilinear", antialias=True)
        tokens: Tensor = self.layers(self.patches(images).flatten(2).mT + self.positions)
        return tokens.mT.unflatten(2, (8, 8))


class AttributeClassifier(nn.Module):
    """An image network with a linear head for each attribute.

    Args:
        attributes: Values of each attribute.
        width: Channels of the first of four convolutional stages; the others have 2, 4 and 4 times as many. Each stage
            halves height and width. A transformer's tokens are 4 times as wide.
        architecture: ``convolution``, or ``transformer``: ``PatchTransformer``.
    """

    def __init__(
        self,
        attributes: Mapping[str, Sequence[str]],
        width: int = 32,
        architecture: Architecture = "convolution",
    ) -> None:
        super().__init__()
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        stages: Iterable[nn.Module] = (
            nn.Sequential(
                nn.Conv2d(inside, outside, 3, stride=2, padding=1),
                nn.GroupNorm(8, outside),
                nn.SiLU(),
                nn.Conv2d(outside, outside, 3, padding=1),
                nn.GroupNorm(8, outside),
                nn.SiLU(),
            )
            for inside, outside in pairwise(widths)
        )
        self.stages = nn.ModuleList([PatchTransformer(widths[-1])] if architecture == "transformer" else stages)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * widths[-1], len(values)) for name, values in self.attributes.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """Mean and maximum over positions of the last stage, (B, 8 * width), of ``images`` (B, 3, H, W) in [-1, 1]."""
        hidden = images
        for stage in self.stages:
            hidden = stage(hidden)
        return torch.cat([hidden.mean(dim=(2, 3)), hidden.amax(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, number of values) per attribute, of ``images`` (B, 3, H, W) in [-1, 1]."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


class ClassifierConfig(NamedTuple):
    """Content of ``config.json``: name, kind and size of the classifier, and attribute and value of each question.

    For a value that no question of the file asks about, there is "Does this picture show VALUE?".
    """

    name: str
    width: int
    architecture: Architecture
    attributes: dict[str, list[str]]
    questions: dict[str, tuple[str, str]]


def read_config(path: str | Path) -> ClassifierConfig:
    """Read ``config.json`` in the folder of a ``ClassifierJudge``; the weights are not read.

    Raises:
        ValueError: A file is missing, or ``config.json`` is wrong.
    """
    for name in ("config.json", "model.safetensors"):
        if not (Path(path) / name).is_file():
            raise ValueError(f"judge={str(path)!r} has no {name}: give a folder made by emoji/judge.yaml.")
    try:
        content = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        attributes = {str(name): [str(value) for value in values] for name, values in content["attributes"].items()}
        questions = {key: (attribute, value) for key, (attribute, value) in content["questions"].items()}
        for attribute, value in questions.values():
            attributes[attribute].index(value)
        asked = {value for _, value in questions.values()}
        more = {value: name for name, values in attributes.items() for value in values if value not in asked}
        questions |= {f"Does this picture show {value}?": (name, value) for value, name in more.items()}
        if (kind := content.get("architecture", "convolution")) not in get_args(Architecture):
            raise ValueError(f"architecture {kind!r} is none of {', '.join(get_args(Architecture))}")
        return ClassifierConfig(str(content["name"]), int(content["width"]), kind, attributes, questions)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"its config.json: {type(error).__name__}: {error}"
        raise ValueError(f"judge={str(path)!r} cannot be read ({reason}): copy it again.") from error


class ClassifierJudge(NamedJudge):
    """Answers questions with an ``AttributeClassifier``; see ``Judge``.

    Args:
        path: Folder with ``model.safetensors`` and ``config.json`` (``name``, ``width``, ``attributes``, and
            ``questions``: question to attribute and value).
        device: Device that the classifier runs on.

    Raises:
        ValueError: A file is missing or corrupt; or (when called) a question is not in ``config.json``.
    """

    quick: ClassVar[bool] = True

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        config = read_config(path)
        self.path, self.name, self.questions = Path(path), config.name, config.questions
        self.classifier = AttributeClassifier(config.attributes, config.width, config.architecture)
        try:
            self.classifier.load_state_dict(load_file(self.path / "model.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"judge={str(path)!r} cannot be read ({reason:.200}): copy it again.") from error
        self.classifier.eval().to(device)
        self.device = torch.device(device)

    @classmethod
    def folder(cls, options: Mapping[str, Any]) -> Path:
        """The folder of the classifier that is made with these arguments."""
        return Path(options["path"])

    @classmethod
    def check(cls, options: Mapping[str, Any], questions: Collection[str]) -> None:
        """See ``NamedJudge.check``; the questions that it can answer are in its ``config.json``."""
        find_device(str(options.get("device", "cpu")))
        folder = cls.folder(options)
        known = read_config(folder).questions
        if unknown := [question for question in dict.fromkeys(questions) if question not in known]:
            raise UnknownQuestionError(str(folder), unknown, known)

    @classmethod
    def questions_known(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        """See ``NamedJudge.questions_known``: one question for each value of an attribute."""
        found = read_config(cls.folder(options)).questions
        return {value: question for question, (_, value) in reversed(found.items())}

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probability of "yes", (B,), for ``images`` (B, 3, H, W) in [0, 1], with one question each."""
        return self.ask(images, range(len(images)), questions)

    @torch.no_grad()
    def ask(self, images: Tensor, rows: Sequence[int], questions: Sequence[str]) -> Tensor:
        """Probability of "yes", (N,), for N ``questions`` about the pictures ``rows``; each is classified once."""
        unknown = sorted(set(questions) - set(self.questions))
        if unknown:
            raise UnknownQuestionError(self.name, unknown, self.questions)
        probabilities = {
            attribute: logits.float().softmax(dim=-1).cpu()
            for attribute, logits in self.classifier(images.to(self.device) * 2 - 1).items()
        }
        answers = []
        for row, question in zip(rows, questions, strict=True):
            attribute, value = self.questions[question]
            answers.append(probabilities[attribute][row, self.classifier.attributes[attribute].index(value)])
        return torch.stack(answers) if answers else torch.zeros(0)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, 8 * width) of ``images`` (B, 3, H, W) in [0, 1], for distances between pictures."""
        return self.classifier.features(images.to(self.device) * 2 - 1).cpu()
