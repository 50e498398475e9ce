"""Shared by the attacks that give the edited model a part of a picture: what goes with what, batches, controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm

import torch
from torch import Tensor

from lit_unlearn.attacks.base import DRAW_BATCH, AttackedModel, Draw
from lit_unlearn.data.concepts import Concept, ConceptSet
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.image_to_image import image_to_image

TARGET, EMPTY = "target prompt", "empty prompt"
"""Names of the usual controls: the edited model does the same with these prompts."""


def target_prompts(concept: Concept, prompts: Sequence[str]) -> list[str]:
    """``prompts`` with the concept's target in place of its names; the target alone for a prompt without a name."""
    return [
        concept.replace_names(prompt, concept.target) if concept.find_name(prompt) else concept.target
        for prompt in prompts
    ]


def unrelated_prompts(concept_set: ConceptSet, edited: Sequence[Concept]) -> list[str]:
    """Direct prompts of the other concepts that name none of ``edited``: the first of each, the second of each, ..."""
    others = [concept for concept in concept_set.concepts.values() if concept not in edited]
    longest = max((len(concept.direct) for concept in others), default=0)
    prompts = [concept.direct[place] for place in range(longest) for concept in others if place < len(concept.direct)]
    return [prompt for prompt in prompts if not any(concept.find_name(prompt) for concept in edited)]


def drawn_in_batches(part: Callable[[list[str], list[int], range], Tensor]) -> Draw:
    """A way to draw any number of pictures.

    Args:
        part: Draws pictures (B, 3, H, W) of at most ``DRAW_BATCH`` prompts and seeds; its last argument are their
            numbers among all pictures.
    """

    @torch.no_grad()
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        batches = [range(first, min(first + DRAW_BATCH, len(prompts))) for first in range(0, len(prompts), DRAW_BATCH)]
        return torch.cat([part([prompts[i] for i in rows], [seeds[i] for i in rows], rows) for rows in batches])

    return draw


def kept(draw: Draw, prompts: Sequence[str], seeds: Sequence[int]) -> Draw:
    """``draw``, but the pictures of these prompts and seeds are drawn now and kept.

    In an attack without a search, drawing them is what the attack costs.
    """
    pictures, own = draw(prompts, seeds), (list(prompts), list(seeds))

    def again(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return pictures if (list(prompts), list(seeds)) == own else draw(prompts, seeds)

    return again


def reference_rows(model: AttackedModel, numbers: Sequence[int]) -> list[int]:
    """Which picture of ``model.references`` belongs to the judged pictures with these numbers.

    Pictures and prompts are both taken in turn; the turns are shifted so that every pair occurs before one recurs.
    """
    count, prompts = len(model.references.latents), len(model.concept.direct)
    return [(number + number // lcm(count, prompts)) % count for number in numbers]


def draw_from_references(
    model: AttackedModel,
    strength: float,
    mask: Tensor | None = None,
    texts: Callable[[Sequence[str]], Sequence[str]] = list,
    is_guided: bool = True,
) -> Draw:
    """Draws pictures that begin as pictures of the concept by the unedited model.

    Args:
        model: The attacked model.
        strength: As for ``image_to_image``.
        mask: As for ``image_to_image``.
        texts: From the judged prompts to the prompts that are drawn.
        is_guided: Whether to draw with the attacker's guidance; otherwise without any.
    """

    def part(prompts: list[str], seeds: list[int], numbers: range) -> Tensor:
        pipeline = model.pipeline
        drawn = image_to_image(
            pipeline,
            pipeline.encode(texts(prompts)),
            model.references.latents[reference_rows(model, numbers)],
            seeds,
            model.num_inference_steps,
            model.guidance_scale if is_guided else 1.0,
            strength,
            model.unconditional() if is_guided else None,
            mask,
        )
        return pipeline.decode(drawn)

    return drawn_in_batches(part)


def reference_controls(model: AttackedModel, strength: float, mask: Tensor | None = None) -> dict[str, Draw]:
    """``draw_from_references`` with the prompts of the target, and with the empty prompt."""

    def targets(prompts: Sequence[str]) -> list[str]:
        return target_prompts(model.concept, prompts)

    return {
        TARGET: draw_from_references(model, strength, mask, targets),
        EMPTY: draw_from_references(model, strength, mask, no_prompts, is_guided=False),
    }


def no_prompts(prompts: Sequence[str]) -> list[str]:
    """The empty prompt, as often as there are ``prompts``."""
    return [""] * len(prompts)


def check_ddim_steps(base: BaseModel, num_inference_steps: int, field: str) -> None:
    """Refuse a number of steps that ``DDIM`` cannot take with this model.

    Raises:
        ValueError: It cannot; the message names the ``field``.
    """
    is_flow = base.folder is not None and base.family.flow
    base.check_steps(num_inference_steps, field, "model" if is_flow else "ddim")


def check_strength(field: str, strength: float, num_inference_steps: int) -> None:
    """Refuse a strength that is less than one step.

    Raises:
        ValueError: It is.
    """
    if int(num_inference_steps * strength) < 1:
        raise ValueError(
            f"{field}={strength} of num_inference_steps={num_inference_steps} is less than one step: give at least "
            f"{1 / num_inference_steps:.2g}."
        )
