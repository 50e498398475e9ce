"""Results of attacks on an edit: the file ``attacks.json`` is written, read, merged and shown here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
KEY = ("seed", "guidance_scale", "negative_prompt")
"""Settings that distinguish results of the same attack on the same concept, so that these stand beside each other."""


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
    controls: dict[str, float | None] = field(default_factory=dict)
    """Share of the pictures that show the concept where the attack helps as much, but is not given its prompt, by name;
    None where the judge gave no answer. Their intervals have the same names."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes the result from all others in a file."""
        return (self.attack, self.concept, *(self.settings.get(name) for name in KEY))

    @property
    def variant(self) -> str:
        """How the attacker draws other than the run, such as ``guidance 1``; empty for the run's own way."""
        guidance_scale, negative = (self.settings.get(name) for name in ("guidance_scale", "negative_prompt"))
        parts = [f"negative prompt {negative!r}"] if negative is not None else []
        if guidance_scale != self.settings.get("run_guidance_scale", guidance_scale):
            parts.insert(0, f"guidance {guidance_scale:g}")
        return ", ".join(parts)

    @property
    def label(self) -> str:
        """Name of the attack, with its variant if there is one; results with the same label may be averaged."""
        return f"{self.attack}, {self.variant}" if self.variant else self.attack

    @property
    def control(self) -> float | None:
        """The largest share of the controls; None if there are none."""
        return max((share for share in self.controls.values() if share is not None), default=None)


def make_result(
    *, verdicts: dict[str, Sequence[bool]], controls: Mapping[str, Sequence[bool]] | None = None, **fields: Any
) -> AttackResult:
    """Make a result, with the shares and intervals of ``verdicts`` and ``controls``.

    Args:
        verdicts: For ``pre_attack``, ``shown`` and ``unedited``: whether each judged picture shows the concept.
        controls: The same for each control; empty for one that the judge gave no answer for.
        **fields: The other fields of ``AttackResult``.
    """
    shares: dict[str, Any] = {name: sum(each) / len(each) for name, each in verdicts.items()}
    of_controls = {name: sum(each) / len(each) if each else None for name, each in (controls or {}).items()}
    judged = {name: each for name, each in {**verdicts, **(controls or {})}.items() if each}
    intervals = {name: wilson_interval(sum(each), len(each)) for name, each in judged.items()}
    return AttackResult(**shares, controls=of_controls, intervals=intervals, **fields)


@dataclass(frozen=True, kw_only=True)
class AttackReport:
    """All attacks on one edit."""

    method: str
    concepts: list[str]
    """The edited concepts."""
    checkpoint: str
    attacks: list[AttackResult]
    schema: int = SCHEMA

    def find(self, attack: str, concept: str, **settings: Any) -> AttackResult | None:
        """The first result of ``attack`` on ``concept`` that has these ``settings``, if there is one."""
        for result in self.attacks:
            same = all(result.settings.get(name) == value for name, value in settings.items())
            if same and (result.attack, result.concept) == (attack, concept):
                return result
        return None

    def merged(self, results: Iterable[AttackResult]) -> AttackReport:
        """A copy with ``results``: each replaces the result with the same key, or is added at the end."""
        by_key = {result.key: result for result in self.attacks}
        by_key |= {result.key: result for result in results}
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
        keys = [result.key for result in self.attacks]
        for result in self.attacks:
            where = f"{result.attack} on {result.concept}"
            if keys.count(result.key) > 1:
                raise ValueError(f"{where} is there twice.")
            if result.concept not in self.concepts:
                raise ValueError(f"{where}: the concept was not edited.")
            shares = {name: getattr(result, name) for name in ("pre_attack", "shown", "unedited")}
            shares |= {name: share for name, share in result.controls.items() if share is not None}
            for name, share in shares.items():
                low, high = result.intervals.get(name, (0.0, 1.0))
                if not 0 <= low <= share <= high <= 1:
                    raise ValueError(f"{where}: {name}={share} with the interval ({low}, {high}) is no share.")


def attacks_table(results: Sequence[AttackResult], title: str) -> Table:
    """Return the table that ``lit-unlearn attack`` prints."""
    table = Table(
        title=Text(title, style="bold", overflow="fold"),
        title_justify="left",
        header_style="bold",
        box=HORIZONTALS,
        collapse_padding=True,
        pad_edge=False,
    )
    several = len({result.concept for result in results}) > 1
    controlled = any(result.controls for result in results)
    if several:
        table.add_column("concept", overflow="fold")
    for header in ("attack", "before", "under attack", *(["control"] if controlled else []), "unedited", "time"):
        is_name = header == "attack"
        table.add_column(header, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    table.add_column("forwards", justify="right", no_wrap=True)
    for result in results:
        low, high = result.intervals["shown"]
        style = "bold red" if result.shown > max(result.pre_attack, result.control or 0.0) else ""
        table.add_row(
            *([result.concept] if several else []),
            Text(result.label),
            f"{result.pre_attack:.2f}",
            Text(f"{result.shown:.2f} ({low:.2f}-{high:.2f})", style=style),
            *([control_cell(result.control)] if controlled else []),
            f"{result.unedited:.2f}",
            f"{result.seconds:.0f} s",
            str(result.unet_forwards),
        )
    if any(result.shown <= result.pre_attack for result in results):
        table.caption = "An attack that fails proves nothing: another one may succeed."
    return table


def attack_words(label: str) -> str:
    """The label of a result in words: without underscores in the name of the attack."""
    attack, comma, variant = label.partition(", ")
    return attack.replace("_", " ") + comma + variant


def control_cell(share: float | None) -> str:
    """The share of a control in a table; a hyphen if there is none."""
    return "-" if share is None else f"{share:.2f}"
