"""The numbers of the paper's Tables 1 to 5, for comparison with ours."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def load_paper_tables() -> dict[str, Any]:
    """Return the paper's scores.

    Returns:
        ``unedited``, ``uce``, ``esd``, ``null_space`` (the paper's method): concept or ``"Average"`` -> ``forget`` and
        ``retain``; and ``harmonic_mean`` (Table 5): one number for each of these four. Numbers are as printed: averages
        are rounded, and most of ESD's forget scores are multiples of 1/24, while the others are multiples of 1/20.
    """
    table = resources.files("lit_unlearn.reports").joinpath("paper_tables.json")
    return json.loads(table.read_text(encoding="utf-8"))


def load_challenge_baselines() -> dict[str, list[float]]:
    """Return the published ERR of the challenge's baselines.

    It is the challenge of the U&Me workshop (ICCV 2025), and the paper uses its concepts. Its page has no numbers for
    LabradorRetriever; it lists a Welsh Springer Spaniel instead.

    Returns:
        For each concept, the ERR of ESD, Concept Ablation and Forget-Me-Not, in this order.
    """
    table = resources.files("lit_unlearn.reports").joinpath("challenge_baselines.json")
    return json.loads(table.read_text(encoding="utf-8"))["err"]
