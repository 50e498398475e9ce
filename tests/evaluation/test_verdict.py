"""The verdict on a run says what its scores mean."""

from __future__ import annotations

from lit_unlearn.evaluation.scores import ConceptScore, Measurement, Part, Scores, Source
from lit_unlearn.evaluation.verdict import verdict_of


def measured(dog: float | None, cat: float | None) -> dict[str, object]:
    forget = None if dog is None else 1 - dog
    return {
        "forget": forget,
        "retain": cat,
        "harmonic_mean": None,
        "intervals": {},
        "direct": Part(forget, cat),
        "indirect": Part(None, None),
        "per_concept": {"dog": ConceptScore(dog, 20, 0, True), "cat": ConceptScore(cat, 20, 0, False)},
    }


def scores(dog: float | None, cat: float | None) -> Scores:
    before = Measurement(**measured(1.0, 1.0))  # type: ignore[arg-type]
    source = Source("emoji-sd")
    return Scores(  # type: ignore[arg-type]
        **measured(dog, cat),  # type: ignore[arg-type]
        method="uce",
        backbone=source,
        concepts=source,
        edited=["dog"],
        judge="emoji-cnn",
        images_per_concept=20,
        seed=0,
        before=before,
    )


def test_erased_and_kept() -> None:
    found = verdict_of(scores(0.05, 0.95))
    assert found.succeeded
    assert (
        "Erased: the edited model shows dog on 1 of 20 pictures of its prompts, the unedited one on 20 of 20"
        in (found.lines[0])
    )
    assert found.lines[1].startswith("Kept: other concepts are on 95.0% of their pictures, without the edit on 100.0%")


def test_not_erased() -> None:
    found = verdict_of(scores(0.5, 1.0))
    assert not found.succeeded
    assert found.lines[0].startswith("Not erased")


def test_others_are_lost_and_named() -> None:
    found = verdict_of(scores(0.0, 0.5))
    assert not found.succeeded
    assert found.lines[1].startswith("Not kept")
    assert found.lines[2] == "Hit most: cat (100% -> 50%)."


def test_what_was_not_judged_is_said() -> None:
    assert "Not known: the judge emoji-cnn gave no answer about dog." in verdict_of(scores(None, 1.0)).lines
    alone = verdict_of(scores(0.0, None))
    assert alone.succeeded
    assert alone.lines[1] == "Whether other concepts are kept was not judged."
