"""Results of attacks on an edit: the file ``attacks.json`` is written, read, merged and shown here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from lit_unlearn.evaluation.metrics import wilson_interval
from lit_unlearn.system.json_files import read_json, read_value, write_json

SCHEMA = 1
"""Version of ``attacks.json``; raised when a field is removed or changes its meaning."""
FILE = "attacks.json"


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack on one concept; shares are over the pictures for which the judge gave an answer."""

    attack: str
    concept: str
    pictures: int
    """Pictures under attack; as many without it and by the unedited model, all from the same prompts and seeds."""
    pre_attack: float
    """Share of the edited model's pictures that show the concept without any attack."""
    shown: float
    """Share of the pictures under attack that show the concept: the attack's success rate."""
    unedited: float
    """Share of the unedited model's pictures that show the concept: the ceiling."""
    intervals: dict[str, tuple[float, float]]
    """Name of a share -> lower and upper bound, at 95 % confidence."""
    seconds: float
    unet_forwards: int
    """Pictures or latents that passed through the UNet in the search, as in the cost of an edit."""
    unet_backwards: int
    settings: dict[str, Any] = field(default_factory=dict)
    found: str
    """A prompt, the name of a file beside ``attacks.json``, or a description of what brings the concept back."""


def make_result(*, verdicts: dict[str, Sequence[bool]], **fields: Any) -> AttackResult:
    """Make a result, with the shares and intervals of ``verdicts``.

    Args:
        verdicts: For ``pre_attack``, ``shown`` and ``unedited``: whether each judged picture shows the concept.
        **fields: The other fields of ``AttackResult``.
    """
    shares: dict[str, Any] = {name: sum(each) / len(each) for name, each in verdicts.items()}
    intervals = {name: wilson_interval(sum(each), len(each)) for name, each in verdicts.items()}
    return AttackResult(**shares, intervals=intervals, **fields)


@dataclass(frozen=True, kw_only=True)
class AttackReport:
    """All attacks on one edit."""

    method: str
    concepts: list[str]
    """The edited concepts."""
    checkpoint: str
    attacks: list[AttackResult]
    schema: int = SCHEMA

    def find(self, attack: str, concept: str) -> AttackResult | None:
        """The result of ``attack`` on ``concept``, if there is one."""
        return next((r for r in self.attacks if (r.attack, r.concept) == (attack, concept)), None)

    def merged(self, results: Iterable[AttackResult]) -> AttackReport:
        """A copy with ``results``: each replaces the result of the same attack and concept, or is added at the end."""
        by_key = {(result.attack, result.concept): result for result in self.attacks}
        by_key |= {(result.attack, result.concept): result for result in results}
        return replace(self, attacks=list(by_key.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``attacks.json``; if writing fails, an earlier file is kept."""
        write_json(
            path,
            {
                "schema": self.schema,
                "method": self.method,
                "concepts": self.concepts,
                "checkpoint": self.checkpoint,
                "attacks": self.attacks,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttackReport:
        """Read an ``attacks.json``.

        Raises:
            ValueError: The file is missing or not JSON, has another schema, a field is missing or misspelt, a share or
                an interval is not valid, or an attack occurs twice.
        """
        path = Path(path)
        content = read_json(path, "`lit-unlearn attack` writes it")
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else None
            raise ValueError(f"{path} has schema {found!r}, this version reads schema {SCHEMA}: attack the run again.")
        try:
            report: AttackReport = read_value(cls, content, "attacks")
            report._check()
        except ValueError as error:
            raise ValueError(f"{path} is no valid file of attacks: {error}") from error
        return report

    def _check(self) -> None:
        keys = [(result.attack, result.concept) for result in self.attacks]
        for result in self.attacks:
            where = f"{result.attack} on {result.concept}"
            if keys.count((result.attack, result.concept)) > 1:
                raise ValueError(f"{where} is there twice.")
            if result.concept not in self.concepts:
                raise ValueError(f"{where}: the concept was not edited.")
            for name in ("pre_attack", "shown", "unedited"):
                share = getattr(result, name)
                low, high = result.intervals.get(name, (0.0, 1.0))
                if not 0 <= low <= share <= high <= 1:
                    raise ValueError(f"{where}: {name}={share} with the interval ({low}, {high}) is no share.")


def attacks_table(results: Sequence[AttackResult], title: str) -> Table:
    """Return the table that ``lit-unlearn attack`` prints."""
    table = Table(
        title=Text(title, style="bold", overflow="fold"), title_justify="left", header_style="bold", box=HORIZONTALS
    )
    several = len({result.concept for result in results}) > 1
    if several:
        table.add_column("concept", overflow="fold")
    table.add_column("attack", overflow="fold")
    for header in ("before", "under attack", "unedited", "time", "forwards"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        low, high = result.intervals["shown"]
        style = "bold red" if result.shown > result.pre_attack else ""
        table.add_row(
            *([result.concept] if several else []),
            result.attack,
            f"{result.pre_attack:.2f}",
            Text(f"{result.shown:.2f} ({low:.2f}-{high:.2f})", style=style),
            f"{result.unedited:.2f}",
            f"{result.seconds:.0f} s",
            str(result.unet_forwards),
        )
    if any(result.shown <= result.pre_attack for result in results):
        table.caption = "An attack that fails proves nothing: another one may succeed."
    return table
