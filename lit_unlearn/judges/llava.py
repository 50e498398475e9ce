"""LLaVA-1.5 as a judge: it gets the question as text, and its answer is the probabilities of "yes" and "no"."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_unlearn.judges.base import NamedJudge, check_installed, resolve_judge_model
from lit_unlearn.judges.cache import weights_version
from lit_unlearn.system.devices import find_device
from lit_unlearn.system.pixels import to_pil

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "llava-hf/llava-1.5-7b-hf"
TEMPLATE = "USER: <image>\n{question} Answer with yes or no. ASSISTANT:"
"""The conversation format of the model card, with the question of the concept set in it."""


class LlavaJudge(NamedJudge):
    """Answers questions with LLaVA-1.5, from the logits of the first token and not from generated text; see ``Judge``.

    The probability of yes is ``p(yes) / (p(yes) + p(no))`` for the first token of the answer, where each is the sum
    over all spellings that are single tokens. If ``p(yes) + p(no)`` is below ``min_answer``, the answer is nan.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit, if ``model`` is a hub id.
        dtype: Type of its weights: ``float16``, ``bfloat16`` or ``float32``.
        device_map: Devices of its parts, as for ``from_pretrained`` (needs accelerate); null uses one device.
        load_in_4bit: Quantise its weights to 4 bits while loading (needs bitsandbytes and a GPU).
        batch_size: Pictures in one forward pass.
        min_answer: Smallest sum of the probabilities of yes and no that counts as an answer.

    Raises:
        ValueError: A value is wrong, or a package is missing; found before the model is loaded.
    """

    short_name: ClassVar[str] = "llava"

    def __init__(
        self,
        model: str = MODEL,
        revision: str | None = None,
        dtype: str = "float16",
        device_map: str | None = None,
        load_in_4bit: bool = False,
        batch_size: int = 8,
        min_answer: float = 0.1,
    ) -> None:
        given = {"model": model, "dtype": dtype, "device_map": device_map, "load_in_4bit": load_in_4bit}
        self.check({**given, "batch_size": batch_size, "min_answer": min_answer}, ())
        from transformers import LlavaForConditionalGeneration, LlavaProcessor

        place = resolve_judge_model(model)
        options: dict[str, Any] = {"revision": revision} if revision else {}
        self.processor = LlavaProcessor.from_pretrained(place, **options)
        self.processor.tokenizer.padding_side = "left"  # the answer comes after the last token of every prompt
        if load_in_4bit:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
        if device_map:
            options["device_map"] = device_map
        options["use_safetensors"] = True
        self.model = LlavaForConditionalGeneration.from_pretrained(place, dtype=getattr(torch, dtype), **options)
        self.model.eval()
        if not device_map and not load_in_4bit:
            self.model.to(find_device())  # type: ignore[arg-type]
        self.batch_size, self.min_answer = batch_size, min_answer
        self.name = f"llava {model}{f'@{revision}' if revision else ''} {'4bit' if load_in_4bit else dtype}"
        if min_answer != 0.1:  # verdicts differ
            self.name += f" min_answer={min_answer:g}"
        self.yes = answer_tokens(self.processor.tokenizer, "yes")
        self.no = answer_tokens(self.processor.tokenizer, "no")

    @property
    def version(self) -> str:
        """Everything besides its name that its answers depend on."""
        return f"{weights_version(self.model)} {self.min_answer}"

    @classmethod
    def check(cls, options: Mapping[str, Any], questions: Collection[str]) -> None:
        """See ``NamedJudge.check``; it can answer any question."""
        defaults = {name: argument.default for name, argument in inspect.signature(LlavaJudge).parameters.items()}
        given = {**defaults, **options}
        resolve_judge_model(given["model"])
        if given["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"judge_options.dtype={given['dtype']!r} is unknown: choose float16, bfloat16 or float32.")
        if given["batch_size"] < 1:
            raise ValueError(f"judge_options.batch_size={given['batch_size']} must be at least 1.")
        if not 0 <= given["min_answer"] < 1:
            raise ValueError(f"judge_options.min_answer={given['min_answer']} must lie in [0, 1).")
        if given["device_map"]:
            check_installed("accelerate", "judge_options.device_map", "llava")
        if given["load_in_4bit"]:
            check_installed("bitsandbytes", "judge_options.load_in_4bit", "llava")

    @torch.no_grad()
    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Probability of "yes" (B,) for ``images`` (B, 3, H, W) in [0, 1], one question each; nan for no answer."""
        answers = []
        for start in range(0, len(questions), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self.processor(
                images=[to_pil(image) for image in images[part].cpu()],
                text=[TEMPLATE.format(question=question) for question in questions[part]],
                padding=True,
                return_tensors="pt",
            ).to(self.model.device, self.model.dtype)
            probabilities = self.model(**inputs).logits[:, -1].float().softmax(dim=-1)
            yes, no = probabilities[:, self.yes].sum(1), probabilities[:, self.no].sum(1)
            answer = yes / (yes + no)
            answers.append(answer.masked_fill(yes + no < self.min_answer, torch.nan).cpu())
        return torch.cat(answers) if answers else torch.zeros(0)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """Ids of the spellings of ``word`` that are one token: with and without a space, in lower and upper case.

    Raises:
        ValueError: No spelling is a single token.
    """
    found = set()
    for spelling in (word, word.capitalize(), word.upper()):
        for text in (spelling, f" {spelling}"):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                found.add(ids[0])
    if not found:
        raise ValueError(f"judge: the tokenizer has no token for {word!r} alone: this model cannot be asked yes or no.")
    return sorted(found)
