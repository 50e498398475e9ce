"""The concepts that a command line names."""

from __future__ import annotations

import re

from lit_unlearn.data.concepts import Concept, ConceptSet


def edited_concepts(concept: str | list[str], concepts: ConceptSet) -> list[Concept]:
    """Look up the concepts that ``concept`` names.

    Raises:
        ValueError: A name is unknown or given twice, or no name is given.
    """
    names = [concept] if isinstance(concept, str) else list(concept)
    try:
        edited = [concepts.get(name) for name in names]
    except ValueError as error:
        several = [name for text in names for name in re.split(r"[,;\uff0c\u3001]", text) if name.strip()]
        if len(several) <= len(names):  # no name looks like several
            raise
        option = f"--concept '[{', '.join(name.strip() for name in several)}]'"
        raise ValueError(f"{str(error).removesuffix('.')}; several concepts are written {option}.") from error
    if not edited:
        raise ValueError("concept=[] edits nothing: name at least one concept.")
    if len({item.name for item in edited}) < len(edited):
        raise ValueError(f"concept={names} names a concept twice.")
    return edited
