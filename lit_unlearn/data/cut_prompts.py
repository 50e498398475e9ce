"""Checks prompts that are longer than a text encoder can read, and refuses prompts that then lose their meaning."""

from __future__ import annotations

from collections.abc import Sequence

from lit_unlearn.data.concepts import Concept, ConceptSet
from lit_unlearn.diffusion.prompts import PromptReader


def check_cuts(reader: PromptReader, concepts: ConceptSet, edited: Sequence[Concept]) -> None:
    """Check the prompts of a set that the text encoders cut, and warn of them.

    Args:
        reader: Reads texts as the model's text encoders do.
        concepts: The set.
        edited: The edited concepts of the set.

    Raises:
        ValueError: After the cut an edit prompt equals its target prompt, or an edit prompt or a direct prompt no
            longer contains the concept's name.
    """
    for concept in edited:
        _check_pairs(reader, concepts, concept)
    read_prompts: list[str] = []
    for concept in concepts.concepts.values():
        for prompt, read in zip(concept.direct, reader.texts(concept.direct), strict=True):
            if not concept.find_name(read):
                raise _error(concepts, concept, "direct", prompt, "so that it measures nothing")
        others = concept.edit_prompts if concept not in edited else (*concept.edit_prompts, *concept.target_prompts)
        read_prompts += [*concept.prompts, *concept.adversarial, *others]
    reader.warn_of_cuts(read_prompts)


def _check_pairs(reader: PromptReader, concepts: ConceptSet, concept: Concept) -> None:
    prompts, targets = concept.edit_prompts, concept.target_prompts
    for prompt, read in zip(prompts, reader.texts(prompts), strict=True):
        if concept.find_name(prompt) and not concept.find_name(read):
            raise _error(concepts, concept, "edit_prompts", prompt, "so that it edits something else")
    pairs = zip(prompts, targets, reader.ids(prompts), reader.ids(targets), strict=True)
    for prompt, target, ids, target_ids in pairs:
        if ids == target_ids:
            raise ValueError(
                f"{concepts.path}: {concept.name}: edit_prompts: the model's text encoder reads {prompt!r} and its "
                f"target prompt {target!r} as the same {len(ids[0])} tokens, so that they edit nothing: shorten or "
                "reword them."
            )


def _error(concepts: ConceptSet, concept: Concept, field: str, prompt: str, why: str) -> ValueError:
    return ValueError(
        f"{concepts.path}: {concept.name}: {field}: the name of the concept in {prompt!r} lies behind what the model's "
        f"text encoder reads of it, {why}: shorten the prompt."
    )
