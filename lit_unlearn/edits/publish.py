"""Uploads an export to the Hugging Face Hub, in one commit, with a model card and the pictures of its test.

Data flow of ``export --push_to_hub NAME``: ``Hub.check`` before a model is loaded; then the export is written; then
``Hub.upload`` sends its files, ``README.md`` (``edits.card``) and the run's ``grid.png``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from lit_unlearn.diffusion.kept import PROVENANCE
from lit_unlearn.diffusion.provenance import PROVENANCE as PREFIX
from lit_unlearn.edits.card import model_card
from lit_unlearn.edits.checkpoint import run_folder
from lit_unlearn.edits.forms import Exported, Form
from lit_unlearn.system.errors import user_errors, warn

PICTURES = "grid.png"
"""Pictures of prompts before and after the edit, which ``test`` writes into the run's folder."""


@dataclass(frozen=True)
class Hub:
    """A model repository to upload to.

    Attributes:
        name: ``OWNER/NAME``.
        private: Make the repository private if it does not exist.
        licence: Identifier for the card, such as ``creativeml-openrail-m``; None leaves the field out.
        overwrite: Add a commit to a repository that exists.
    """

    name: str
    private: bool = False
    licence: str | None = None
    overwrite: bool = False

    @property
    def api(self) -> HfApi:
        """The Hub's interface, at ``HF_ENDPOINT`` if that is set."""
        return HfApi(token=get_token())

    def check(self) -> None:
        """Ask the Hub whether this can be uploaded.

        Raises:
            ValueError: The name is wrong, nobody is logged in, the token may only read, the Hub cannot be reached, or
                the repository exists.
        """
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ValueError(f"push_to_hub={self.name!r} is no name of a repository, such as you/model-dog.") from error
        if self.name.count("/") != 1:
            raise ValueError(f"push_to_hub={self.name!r} does not say whose repository it is: give OWNER/NAME.")
        if get_token() is None:
            raise ValueError("push_to_hub needs a token of the Hugging Face Hub: run hf auth login, or set HF_TOKEN.")
        with _explained(self.name):
            role = ((self.api.whoami().get("auth") or {}).get("accessToken") or {}).get("role")
            exists = self.api.repo_exists(self.name)
        if role == "read":  # what a fine-grained token may do is told at the upload: its scopes have no fixed form
            raise ValueError(f"push_to_hub={self.name}: the token may only read: take one with the right to write.")
        if exists and not self.overwrite:
            raise ValueError(
                f"push_to_hub={self.name} exists on the Hub: choose another name, or pass --overwrite to add to it."
            )
        if exists and self.private:
            raise ValueError(
                f"push_to_hub={self.name} exists, and --private is for a new repository: leave it out, or choose "
                "another name."
            )

    def upload(self, exported: Exported, form: Form, ckpt_path: str | Path) -> str:
        """Upload what was written; return the address of the repository.

        Args:
            exported: What ``export_edit`` has written.
            form: Its form.
            ckpt_path: The edit, whose run's folder has the pictures.

        Raises:
            ValueError: The Hub has refused it, or cannot be reached any more.
        """
        path = exported.path
        files = {path.name: path}
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        folder = run_folder(ckpt_path)
        pictures = folder / PICTURES if folder is not None else None
        if pictures is not None and pictures.is_file():
            files[PICTURES] = pictures
        else:
            pictures = None
            warn(f"{self.name} gets no example pictures: no test has written {PICTURES}.")
        if self.licence is None:
            warn(f"The card of {self.name} has no licence field: pass --license.")
        card = model_card(
            facts_of(path),
            self.name,
            form=form,
            file=path.name,
            licence=self.licence,
            pictures=None if pictures is None else PICTURES,
        )
        operations = [
            CommitOperationAdd(name, str(file)) for name, file in files.items() if name.lower() != "readme.md"
        ]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        with _explained(self.name):
            url = self.api.create_repo(self.name, private=self.private, exist_ok=self.overwrite)
            what = ", ".join(exported.edit.concepts) or exported.edit.method
            self.api.create_commit(self.name, operations, commit_message=f"Add an edit of {what} as {form}")
        return str(url)


def checked_hub(name: str, private: bool, licence: str | None, overwrite: bool) -> Hub:
    """The repository ``name``, after the Hub was asked whether this can be uploaded.

    Raises:
        UserError: As ``Hub.check``.
    """
    hub = Hub(name, private, licence, overwrite)
    with user_errors():
        hub.check()
    return hub


def facts_of(path: Path) -> dict[str, Any]:
    """Provenance of an export: from its folder, or from the metadata of its file."""
    if path.is_dir():
        found: dict[str, Any] = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
        return found
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    prefix = PREFIX if f"{PREFIX}kind" in metadata else ""  # a copy of a single file has entries of its own too
    return {
        name.removeprefix(prefix): json.loads(value)
        for name, value in metadata.items()
        if name.startswith(prefix) and name != "format"
    }


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {
            401: "the token is not valid: run hf auth login",
            403: "the token may not write there: take one with the right to write",
        }.get(status, f"the Hub answers {status}: {str(error).strip().splitlines()[-1]}")
        raise ValueError(f"push_to_hub={name}: {why}.") from error
    except HTTPError as error:
        raise ValueError(
            f"push_to_hub={name}: the Hub cannot be reached ({error}): try again once it can, or export without it."
        ) from error
