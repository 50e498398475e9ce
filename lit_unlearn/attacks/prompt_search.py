"""Discrete prompt search by gradient, similar to UnlearnDiffAtk (Zhang et al., 2024) and P4D (Chin et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_unlearn.attacks.base import AttackedModel, Found, denoising_errors, noise_draws
from lit_unlearn.attacks.restarts import RestartableAttack, start_generator
from lit_unlearn.attacks.token_search import search_tokens
from lit_unlearn.diffusion.new_tokens import PLACE
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.diffusion.text import Tokens

SCORED = 16
"""Number of noised pictures, always the same ones, on which the discrete prompts of a search are compared."""
EACH_SCORED = 4
"""As ``SCORED``, for each picture that has its own prefix."""
BATCH, EACH_BATCH = 8, 2
"""Number of noised pictures in a step: for the prefix of all prompts, and for each picture that has its own."""
AT_ONCE = 10
"""Number of noised pictures in a step when pictures with prefixes of their own are searched together."""


@dataclass(frozen=True, kw_only=True)
class PromptSearch(RestartableAttack):
    """Finds one prefix for all prompts of the concept, with which the edited model best denoises its pictures.

    With several text encoders a word is one that is a single token in each of them (a T5 has another vocabulary than a
    CLIP), and all encoders read the same relaxed words.

    The search uses edit prompts and the unedited model's pictures of them. It does not use the direct prompts, on which
    the prefix is judged. With ``per_prompt`` it does, and finds a prefix for each judged picture, as UnlearnDiffAtk.

    Attributes:
        steps: Steps of Adam; with per_prompt, for each picture.
        num_tokens: Number of words of the prefix, one token each in every text encoder.
        learning_rate: Learning rate of the relaxed one-hot weights.
        batch_size: Number of noised pictures in a step; null takes 8; with per_prompt 2 of each picture.
        window: Range of timesteps to draw from, as fractions of all, where the prompt matters most.
        straight_through: Compute the loss on single tokens (P4D) or, if false, on mixtures (UnlearnDiffAtk).
        exclude_names: Do not use the concept's own names as words.
        per_prompt: Find a prefix for each judged picture, and look at that picture during the search.
    """

    name: ClassVar[str] = "prompt_search"

    steps: int = 100
    num_tokens: int = 5
    learning_rate: float = 0.1
    batch_size: int | None = None
    window: tuple[float, float] = (0.3, 0.9)
    straight_through: bool = True
    exclude_names: bool = True
    per_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(f"{self.name}.window={self.window} must be two shares between 0 and 1, the lower first.")

    @property
    def num_noised(self) -> int:
        """Number of noised pictures in a step."""
        usual = EACH_BATCH if self.per_prompt else BATCH
        return usual if self.batch_size is None else self.batch_size

    def settings(self) -> dict[str, Any]:
        """As in the base class, with the batch size that is used."""
        return {**super().settings(), "batch_size": self.num_noised}

    @property
    def label(self) -> str:
        """``prompt_search``, or ``prompt_search_each`` with ``per_prompt``."""
        return f"{self.name}_each" if self.per_prompt else self.name

    @property
    def learns_from_pictures(self) -> bool:  # type: ignore[override]
        """Whether the search learns from pictures of edit prompts, and not from one of each judged prompt."""
        return not self.per_prompt

    def search(self, model: AttackedModel) -> Found:
        """Find the prefix of all prompts, or one for each."""
        return self.search_each(model) if self.per_prompt else super().search(model)

    def search_from(self, model: AttackedModel, start: int) -> Found:
        """Find the prefix of all prompts."""
        pipeline, references = model.pipeline, model.references
        latents = references.latents
        allowed = allowed_words(model, self.exclude_names)
        tokens = pipeline.tokenize_templates([f"{PLACE} {prompt}" for prompt in references.prompts], self.num_tokens)

        def errors(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            rows, noise, timesteps = noise_draws(latents, pipeline.noise, generators, self.window)
            condition = pipeline.encode_mixtures(weights[0], allowed, tokens[rows])
            return denoising_errors(pipeline, condition, latents[rows], noise, timesteps).mean()[None]

        def losses(weights: Tensor, step: int) -> Tensor:
            return errors(weights, [seeded(model.seed, self.name, step, item) for item in range(self.num_noised)])

        def score(weights: Tensor) -> Tensor:
            return errors(weights, [seeded(model.seed, self.name, "score", item) for item in range(SCORED)])

        places, scores = search_tokens(
            losses,
            (1, self.num_tokens, len(allowed)),
            self.steps,
            self.learning_rate,
            start_generator(start, model.seed, self.name),
            latents.device,
            self.straight_through,
            score,
        )
        prefix = pipeline.words_of(allowed[places[0].cpu()])

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.draw([f"{prefix} {prompt}" for prompt in prompts], seeds)

        return Found(f"{prefix} {model.prompts[0]}", draw, {"prefix": prefix}, loss=float(scores))

    def search_each(self, model: AttackedModel) -> Found:
        """Find a prefix for each judged picture, from the unedited model's picture of the same prompt and seed.

        As in UnlearnDiffAtk, a prompt that shows the concept without a prefix needs none, and the search for a picture
        ends as soon as it shows the concept; other starts are for pictures that do not yet. If a picture never does,
        the prefix with the lowest loss is taken.
        """
        search = EachSearch(self, model)
        shares = []
        for start in range(model.restarts):
            if len(search.open):
                for numbers in search.open.split(max(1, AT_ONCE // self.num_noised)):
                    search.run(numbers, start)
            shares.append(1 - len(search.open) / model.num_pictures)
        texts = dict(zip(zip(model.prompts, model.seeds, strict=True), search.texts, strict=True))

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.draw([texts[item] for item in zip(prompts, seeds, strict=True)], seeds)

        report: dict[str, Any] = {"prompts": search.texts, "looks": search.looks.tolist()}
        if model.restarts > 1:
            report |= {"restarts": model.restarts, "shown_after": shares}
        return Found(search.texts[0], draw, report)


class EachSearch:
    """Searches a prefix for each judged picture of ``model``.

    Attributes:
        texts: For each picture the prompt with the best prefix so far.
        looks: How often the picture of each was drawn and judged, (n,) int.
        losses: Loss of each text, (n,); ``-inf`` if its picture shows the concept.
    """

    def __init__(self, attack: PromptSearch, model: AttackedModel) -> None:
        self.attack, self.model = attack, model
        self.texts = list(model.prompts)
        self.latents = model.unedited_latents(model.prompts, model.seeds)
        shown = torch.tensor(model.shows(model.draw(model.prompts, model.seeds)))
        self.looks = torch.ones(len(shown), dtype=torch.long)
        self.losses = torch.where(shown, -torch.inf, torch.inf)
        self.allowed = allowed_words(model, attack.exclude_names)

    @property
    def open(self) -> Tensor:
        """Numbers of the pictures that do not show the concept yet."""
        return (~self.losses.isneginf()).nonzero().flatten()

    def run(self, numbers: Tensor, start: int) -> None:
        """Search for the pictures with these ``numbers`` at once, each from a start of its own."""
        attack, model, pipeline = self.attack, self.model, self.model.pipeline
        prompts, seeds = [model.prompts[i] for i in numbers], [model.seeds[i] for i in numbers]
        latents = self.latents[numbers]
        tokens = tokenize_apart(pipeline, [f"{PLACE} {prompt}" for prompt in prompts], attack.num_tokens)
        todo = torch.arange(len(numbers))  # those that are not shown yet

        def errors(weights: Tensor, count: int, *key: object) -> Tensor:
            generators = [seeded(model.seed, attack.name, *key, item) for item in range(len(todo) * count)]
            _, noise, timesteps = noise_draws(latents, pipeline.noise, generators, attack.window)
            rows = todo.repeat_interleave(count)
            condition = pipeline.encode_mixtures(weights.flatten(0, 1), self.allowed, tokens[rows])
            found = denoising_errors(pipeline, condition, latents[rows], noise, timesteps)
            return weights.new_zeros(len(numbers)).index_put((todo.to(found.device),), found.view(-1, count).mean(1))

        def losses(weights: Tensor, step: int) -> Tensor:
            return errors(weights, attack.num_noised, step)

        def texts_of(places: Tensor) -> list[str]:
            words = [pipeline.words_of(self.allowed[row]) for row in places.cpu()]
            return [f"{prefix} {prompt}" for prefix, prompt in zip(words, prompts, strict=True)]

        def is_shown(places: Tensor) -> Tensor:
            nonlocal todo
            texts = texts_of(places)
            shown = model.shows(model.draw([texts[i] for i in todo], [seeds[i] for i in todo]))
            self.looks[numbers[todo]] += 1
            found = torch.zeros(len(numbers), dtype=torch.bool).index_put((todo,), torch.tensor(shown))
            todo = todo[~found[todo]]
            return found

        places, scores = search_tokens(
            losses,
            (len(numbers), attack.num_tokens, len(self.allowed)),
            attack.steps,
            attack.learning_rate,
            start_generator(start, model.seed, attack.name, "each", *numbers.tolist()),
            latents.device,
            attack.straight_through,
            lambda weights: errors(weights, EACH_SCORED, "score"),
            suffices=is_shown,
        )
        better = scores.cpu() < self.losses[numbers]
        for place in better.nonzero().flatten().tolist():
            self.losses[numbers[place]] = scores[place]
            self.texts[numbers[place]] = texts_of(places)[place]


def tokenize_apart(pipeline: Pipeline, templates: Sequence[str], count: int) -> Tokens:
    """As ``Pipeline.tokenize_templates``, if each template has ``count`` learned tokens of its own.

    The learned tokens of all templates are concatenated, (templates * count, D).
    """
    tokens = pipeline.tokenize_templates(templates, count)
    first = count * torch.arange(len(templates)).unsqueeze(1)
    return Tokens(tokens.ids, tuple(torch.where(slots >= 0, slots + first, slots) for slots in tokens.slots))


def allowed_words(model: AttackedModel, exclude_names: bool) -> Tensor:
    """The words (A, E) that a searched prompt may contain, as their tokens in each of E text encoders."""
    pipeline, concept = model.pipeline, model.concept
    return pipeline.whole_words(concept.find_name, concept.names) if exclude_names else pipeline.whole_words()
