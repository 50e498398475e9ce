"""Golden numbers: the paper's tables, recomputed."""

from __future__ import annotations

import pytest

from lit_unlearn.evaluation.metrics import both_harmonic_means
from lit_unlearn.reports.paper import load_paper_tables

TABLES = load_paper_tables()
METHODS = ("unedited", "uce", "esd", "null_space")


def per_concept(method: str) -> tuple[list[float], list[float]]:
    rows = [row for concept, row in TABLES[method].items() if concept != "Average"]
    return [row["forget"] for row in rows], [row["retain"] for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_averages_of_tables_1_to_4(method: str) -> None:
    forget, retain = per_concept(method)
    assert len(forget) == len(retain) == 20
    # Printed to three digits, so off by at most half of the last one.
    assert sum(forget) / 20 == pytest.approx(TABLES[method]["Average"]["forget"], abs=5.01e-4)
    assert sum(retain) / 20 == pytest.approx(TABLES[method]["Average"]["retain"], abs=5.01e-4)


@pytest.mark.parametrize(
    ("method", "of_averages", "average"),
    [
        ("unedited", 0.314, 0.265),
        ("uce", 0.481, 0.413),
        ("esd", 0.505, 0.446),
        ("null_space", 0.643, 0.582),
    ],
)
def test_harmonic_means_of_table_5(method: str, of_averages: float, average: float) -> None:
    ours = both_harmonic_means(*per_concept(method))
    assert ours == pytest.approx((of_averages, average), abs=5e-4)
    # The paper prints the harmonic mean of the averages, up to 1e-3 low; the other one is far off.
    assert ours[0] == pytest.approx(TABLES["harmonic_mean"][method], abs=2e-3)
    assert abs(ours[1] - TABLES["harmonic_mean"][method]) > 0.04


def test_every_method_has_the_same_concepts() -> None:
    assert len({tuple(sorted(TABLES[method])) for method in METHODS}) == 1
