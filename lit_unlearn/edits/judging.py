"""What a run was judged with: its concept set and its judge, as its edit records them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_unlearn.data.concepts import Concept, ConceptSet, available_concept_sets, concept_set_of, load_concept_set
from lit_unlearn.edits.checkpoint import Edit
from lit_unlearn.judges.base import Judge
from lit_unlearn.judges.load import check_stored, load_judge


def concept_set_of_edit(edit: Edit) -> ConceptSet:
    """The concept set of the run; for a delta whose set is a file of somebody else, the content stored in the delta.

    Raises:
        ValueError: The content of the set has changed since the edit.
    """
    name = edit.hyper_parameters.get("concept_set", "emoji20")
    if edit.concept_set is not None and name not in available_concept_sets() and not Path(name).exists():
        return concept_set_of(edit.concept_set, edit.path)
    concept_set = load_concept_set(name)
    edit.check_set(concept_set)
    return concept_set


def judge_of_edit(
    edit: Edit,
    judge: str | None,
    options: Mapping[str, Any] | None,
    concept_set: ConceptSet,
    asked: Sequence[Concept],
) -> Judge:
    """The given judge, or the run's.

    Args:
        edit: The run's edit.
        judge: Name of a judge; None for the run's.
        options: Arguments of the judge; None for the run's if the judge is the run's, else for the defaults.
        concept_set: The concept set of the run.
        asked: Concepts whose questions it must be able to answer.

    Raises:
        ValueError: The judge is unknown, or cannot answer; or the run's is no judge of this package.
    """
    if judge is None:
        judge, stored = edit.hyper_parameters.get("judge", "emoji"), edit.hyper_parameters.get("judge_options") or {}
        options = stored if options is None else options
        check_stored(judge, options, edit.path)
    return load_judge(judge, options or {}, concept_set, list(dict.fromkeys(asked)))
