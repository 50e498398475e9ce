"""Pages of the site that are made when it is built: commands, recipes, and files that lie outside of ``docs``."""

from __future__ import annotations

import json
import re
from argparse import HelpFormatter
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "checkpoints/emoji-sd/README.md": "models/emoji-sd.md",
    "checkpoints/emoji-sd/samples.png": "models/samples.png",
    "checkpoints/emoji-dit/README.md": "models/emoji-dit.md",
    "checkpoints/emoji-dit/samples.png": "models/emoji-dit.png",
    "examples/first_edit.ipynb": "examples/first_edit.ipynb",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "reference/contributing.md",
    "NOTICE": "reference/notice.txt",
}
"""Files of the repository that are pages too, or are linked to."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made or copied."""
    for source, page in OUTSIDE.items():
        content = (TOP / source).read_bytes()
        if page.endswith(".md"):
            text = content.decode().replace("](samples.png)", "](emoji-dit.png)" if "dit" in page else "](samples.png)")
            text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the card's metadata
            content = re.sub(r"\]\(docs/", "](../", text).encode()
        files.append(File.generated(config, page, content=content))
    made = {"reference/commands.md": commands(), "reference/recipes.md": recipes()}
    made |= {f"examples/{file.stem}.md": notebook(file) for file in (TOP / "examples").glob("*.ipynb")}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave ``docs`` to the pages of ``OUTSIDE``."""
    up = "../" * page.file.src_uri.count("/")
    for source, target in OUTSIDE.items():
        markdown = markdown.replace(f"]({up}../{source})", f"]({up}{target})")
    return markdown


def notebook(file: Path) -> str:
    """A notebook as a page: its text, and its code in blocks."""
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(1, f"This page is [a notebook]({file.name}): download it, and run it in Jupyter.")
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """What ``--help`` says, of each command; of the trainer's, only what they are."""
    from lit_unlearn.commands.registry import OTHER_COMMANDS, TRAINER_COMMANDS

    parts = ["# Commands", "Generated from `lit-unlearn COMMAND --help`."]
    for name, what in TRAINER_COMMANDS.items():
        parts += [f"## lit-unlearn {name}", f"{what[0].upper()}{what[1:]}."]
        parts += [f"    lit-unlearn {name} --config RECIPE --concept NAME [--KEY VALUE ...]"]
        parts += [f"Every key of a [recipe](recipes.md) is an option; `lit-unlearn {name} --help` lists the trainer's."]
    for name in OTHER_COMMANDS:
        parser = import_module(f"lit_unlearn.commands.{name}").parser()
        parser.formatter_class = partial(HelpFormatter, width=100)
        parts.append(f"## lit-unlearn {name}\n\n```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """All recipes, each in full."""
    parts = ["# Recipes", "`--config NAME` takes a file, or one of these names. Options win over the recipe."]
    for file in sorted((TOP / "configs").rglob("*.yaml")):
        name = file.relative_to(TOP / "configs").as_posix()
        parts.append(f"## {name}\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"
