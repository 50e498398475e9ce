"""Reads lists of prompts and of concepts in the layouts that people have: CSV, TSV, or text with a prompt a line.

Columns are found by their usual names, in upper or lower case: ``prompt`` (or ``adv_prompt``, ``text``), with
``evaluation_seed``, ``sd_seed`` or ``seed`` and ``evaluation_guidance``, ``sd_guidance_scale`` or ``guidance`` where
the list has them (I2P, Ring-A-Bell, MMA-Diffusion, the artists of ESD). A list of concepts has ``concept`` (``artist``,
``class``, ``name``) and ``to`` (``target``), with ``kind`` and ``names`` (separated by semicolons) where given.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from lit_unlearn.data.templates import Wish

PROMPT = ("prompt", "adv_prompt", "prompts", "text", "caption")
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
CONCEPT = ("concept", "artist", "class", "name")
TARGET = ("to", "target", "anchor")
MAX_BYTES, MAX_ROWS = 20_000_000, 100_000
"""Limits of a list, so that a wrong file does not take minutes."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a list, with the seed and the guidance scale that the list has for it; None where it has none."""

    prompt: str
    seed: int | None = None
    guidance_scale: float | None = None


def read_prompts(path: str | Path, option: str = "prompts") -> list[PromptRow]:
    """Read a list of prompts; empty lines are left out.

    Raises:
        ValueError: The file cannot be read, or has no column with prompts, or a number in it is none.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".csv", ".tsv"):
        lines = [" ".join(line.split()) for line in _text(path, option).splitlines()]
        rows = [PromptRow(line) for line in lines if line]
    else:
        rows = []
        for number, row in enumerate(_table(path, option), start=2):
            where = f"{option}={path}, line {number}"
            prompt = " ".join(_value(row, PROMPT, f"{option}={path}").split())
            seed, guidance = (next((row[key] for key in keys if row.get(key)), "") for keys in (SEED, GUIDANCE))
            try:
                found = PromptRow(prompt, int(float(seed)) if seed else None, float(guidance) if guidance else None)
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{where}: {seed or guidance!r} is not a number: correct it.") from error
            if prompt:
                rows.append(found)
    if not rows:
        raise ValueError(f"{option}={path} has no prompt: write one on each line.")
    return rows


def read_wishes(path: str | Path, kind: str | None = None) -> list[Wish]:
    """Read a list of concepts, each with its target.

    Args:
        path: The list.
        kind: Kind of the concepts for which the list has none; None for ``style`` with a column ``artist``, otherwise
            ``object``.

    Raises:
        ValueError: The file cannot be read, or has no such columns.
    """
    path = Path(path).expanduser()
    wishes = {}
    for row in _table(path, "table"):
        name, target = (_value(row, keys, f"table={path}").strip() for keys in (CONCEPT, TARGET))
        own = (row.get("kind") or kind or ("style" if "artist" in row else "object")).strip()
        also = tuple(label.strip() for label in (row.get("names") or "").split(";") if label.strip())
        if name:
            wishes[name] = Wish(name, target, own, also)
    if not wishes:
        raise ValueError(f"table={path} has no concept: write one in each line.")
    return list(wishes.values())


def _value(row: dict[str, str], keys: tuple[str, ...], where: str) -> str:
    for key in keys:
        if key in row:
            return row[key]
    raise ValueError(f"{where} has no column {keys[0]} (or {', '.join(keys[1:])}): its columns are {', '.join(row)}.")


def _table(path: Path, option: str) -> list[dict[str, str]]:
    """The rows of a table, by the names of its columns in lower case; a line feed may stand in a quoted value."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(f"{option}={path} is not a table: give a .csv or .tsv file.")
    text = _text(path, option)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        rows: list[dict[str, str]] = []
        for row in reader:  # None is the key of more values than columns, and the value of fewer
            rows.append({str(key).strip().casefold(): value or "" for key, value in row.items() if key is not None})
            if len(rows) > MAX_ROWS:
                raise ValueError(f"{option}={path} has more than {MAX_ROWS:,} lines: is it the right file?")
    except csv.Error as error:
        raise ValueError(f"{option}={path} cannot be read ({error}): save it as a table in UTF-8.") from error
    return rows


def _text(path: Path, option: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{option}={path} is larger than {MAX_BYTES:,} bytes: is it the right file?")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{option}={path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}={path} is not text in UTF-8: save it as such.") from error
