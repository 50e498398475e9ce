"""From the name of a judge to the judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lit_unlearn.data.concepts import ConceptSet
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.judges.base import Judge
from lit_unlearn.judges.classifier import ClassifierJudge, check_judge
from lit_unlearn.judges.clip import ClipJudge
from lit_unlearn.judges.llava import LlavaJudge, check_llava
from lit_unlearn.judges.nudenet import QUESTION, NudeNetJudge, check_nudenet

EMBEDDED = "emoji"
KINDS: dict[str, Callable[..., Judge]] = {"llava": LlavaJudge, "clip": ClipJudge, "nudenet": NudeNetJudge}


def check_judge_name(name: str, options: Mapping[str, Any], concepts: ConceptSet) -> None:
    """Check a judge's name, its options and what it needs, without loading it.

    Args:
        name: ``emoji``, ``llava``, ``clip``, ``nudenet``, or the folder of a ``ClassifierJudge``.
        options: Arguments of the judge.
        concepts: The concept set whose questions it will be asked.

    Raises:
        ValueError: What is wrong, and what to do.
    """
    if name not in KINDS:
        if options:
            raise ValueError(f"judge_options are for {', '.join(KINDS)}; judge={name!r} has none.")
        if name == EMBEDDED:  # looked for only when pictures are judged: a fit does without it
            return
        if not judge_folder(name).is_dir() and (close := get_close_matches(name, [*KINDS, EMBEDDED], n=1)):
            raise ValueError(f"judge={name!r} is no judge and no folder (closest: {close[0]}).")
        return check_judge(str(judge_folder(name)))
    known = [p for p in inspect.signature(KINDS[name]).parameters if p != "concepts"]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"judge_options.{unknown[0]} is unknown to {name}: it has {', '.join(known) or 'none'}.")
    if name == "llava":
        given = {"dtype": "float16", "device_map": None, "load_in_4bit": False, "batch_size": 8, "min_answer": 0.1}
        check_llava(**{key: options.get(key, default) for key, default in given.items()})  # type: ignore[arg-type]
    if name == "nudenet":
        check_nudenet()
        for concept in concepts.concepts.values():
            if concept.question != QUESTION:
                raise ValueError(
                    f"judge='nudenet' answers only {QUESTION!r}, but {concept.name} of {concepts.name} asks "
                    f"{concept.question!r}: take another judge, or a concept set about nudity."
                )


def load_judge(name: str, options: Mapping[str, Any], concepts: ConceptSet) -> Judge:
    """Load the judge ``name``; arguments as for ``check_judge_name``.

    Raises:
        ValueError: As ``check_judge_name``; or the embedded judge is missing.
    """
    check_judge_name(name, options, concepts)
    if name == "clip":
        return ClipJudge(concepts, **options)
    return KINDS[name](**options) if name in KINDS else ClassifierJudge(judge_folder(name))


def judge_folder(judge: str) -> Path:
    """Folder of the ``ClassifierJudge`` that ``judge`` names: ``emoji`` is the one beside the embedded model."""
    return Path(resolve_model("emoji-sd")) / "judge" if judge == EMBEDDED else Path(judge).expanduser()
