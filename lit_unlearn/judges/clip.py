"""Zero-shot CLIP as a judge: which concept of its kind fits a picture best."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_unlearn.data.concepts import ConceptSet
from lit_unlearn.judges.base import NamedJudge, UnknownQuestionError, resolve_judge_model
from lit_unlearn.judges.cache import weights_version
from lit_unlearn.system.devices import find_device
from lit_unlearn.system.pixels import to_pil

MODEL = "openai/clip-vit-large-patch14"
TEMPLATES = {
    "object": "a picture of {}",
    "person": "a picture of {}",
    "character": "a picture of {}",
    "action": "a picture of someone {}",
    "style": "a picture in the style of {}",
    "scene": "a picture with {}",
    "content": "a picture with {}",
}
NOTHING = "a picture"


class ClipJudge(NamedJudge):
    """Answers with the softmax of CLIP's similarities over the concepts of a kind; see ``Judge``.

    The probability of yes is the asked concept's probability among all concepts of its kind and "a picture", which
    stands for a picture without any of them. CLIP does not understand "not", so it cannot judge one concept alone.

    Args:
        concepts: The concept set whose questions are asked.
        model: Hub id or folder.
        revision: Branch, tag or commit, if ``model`` is a hub id.
        batch_size: Pictures in one forward pass.

    Raises:
        ValueError: ``model`` or ``batch_size`` is wrong.
    """

    short_name: ClassVar[str] = "clip"

    def __init__(
        self, concepts: ConceptSet, model: str = MODEL, revision: str | None = None, batch_size: int = 32
    ) -> None:
        self.check({"model": model, "batch_size": batch_size}, ())
        from transformers import CLIPModel, CLIPProcessor

        place = resolve_judge_model(model)
        options: dict[str, Any] = {"revision": revision} if revision else {}
        self.processor = CLIPProcessor.from_pretrained(place, **options)
        self.model = CLIPModel.from_pretrained(place, use_safetensors=True, **options).eval()
        self.model.to(find_device())
        self.name = f"clip {model}{f'@{revision}' if revision else ''} {concepts.name}"
        self.batch_size = batch_size
        self.choices = choices(concepts)
        self.texts = sorted({text for _, texts in self.choices.values() for text in texts})
        inputs = self.processor(text=self.texts, padding=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            # pooler_output is the projected embedding (transformers 5).
            self.text_embeddings = normalised(self.model.get_text_features(**inputs).pooler_output)

    @property
    def version(self) -> str:
        """Everything besides its name that its answers depend on."""
        return f"{weights_version(self.model)} {self.choices}"

    @classmethod
    def check(cls, options: Mapping[str, Any], questions: Collection[str]) -> None:
        """See ``NamedJudge.check``; it can answer every question of its concept set."""
        resolve_judge_model(options.get("model", MODEL))
        if options.get("batch_size", 1) < 1:
            raise ValueError(f"judge_options.batch_size={options['batch_size']} must be at least 1.")

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probability of "yes" (B,) for ``images`` (B, 3, H, W) in [0, 1], one question each.

        Raises:
            ValueError: A question is not in the concept set.
        """
        return self.ask(images, range(len(images)), questions)

    @torch.no_grad()
    def ask(self, images: Tensor, rows: Sequence[int], questions: Sequence[str]) -> Tensor:
        """Probability of "yes" (N,) for N ``questions`` about the pictures ``rows``; each is embedded once.

        Raises:
            ValueError: A question is not in the concept set.
        """
        if unknown := sorted(set(questions) - set(self.choices)):
            raise UnknownQuestionError(self.name, unknown, self.choices)
        logits = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size].cpu()
            inputs = self.processor(images=[to_pil(image) for image in part], return_tensors="pt")
            features = self.model.get_image_features(**inputs.to(self.model.device)).pooler_output
            logits += (self.model.logit_scale.exp() * normalised(features) @ self.text_embeddings.mT).float().cpu()
        answers = []
        for row, question in zip(rows, questions, strict=True):
            asked, texts = self.choices[question]
            among = logits[row][[self.texts.index(text) for text in texts]]
            answers.append(among.softmax(dim=-1)[texts.index(asked)])
        return torch.stack(answers) if answers else torch.zeros(0)


def choices(concepts: ConceptSet) -> Mapping[str, tuple[str, list[str]]]:
    """For each question, the text of its concept and the texts that CLIP chooses from."""
    texts = {c.name: TEMPLATES[c.kind].format(c.names[0]) for c in concepts.concepts.values()}
    return {
        concept.question: (
            texts[concept.name],
            [texts[other.name] for other in concepts.concepts.values() if other.kind == concept.kind] + [NOTHING],
        )
        for concept in concepts.concepts.values()
    }


def normalised(features: Tensor) -> Tensor:
    """``features`` (B, D) with each row scaled to length 1."""
    return features / features.norm(dim=-1, keepdim=True)
