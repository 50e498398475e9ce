"""One run, one folder: who writes into it, whether it was finished, and which one an interrupted command goes on with.

``RUN/run.json`` says of what configuration a fit is and whether it is finished. A fit that was killed leaves it at
``running``: the same command then goes on there, from its last checkpoint. ``RUN/.lock`` is held while a fit writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.edits.checkpoint import newest_checkpoint, run_folder
from lit_unlearn.system.errors import UserError
from lit_unlearn.system.files import WriteError, naming, remove, remove_if_possible
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.names import LONGEST_LABEL, file_name, joint_name

RUN_FILE, LOCK_FILE = "run.json", ".lock"
RUNNING, FINISHED = "running", "finished"

DEFAULT_SET = "emoji20"
"""The concept set whose runs have the plain names of its concepts."""

NO_PART_OF_A_RUN = {"ckpt_path", "overwrite", "fresh", "once", "weights_only"}
"""Options that do not change what a fit finds."""
NO_PART_OF_A_TRAINER = {
    "accelerator",
    "default_root_dir",
    "devices",
    "enable_model_summary",
    "enable_progress_bar",
    "logger",
    "num_nodes",
    "profiler",
    "strategy",
}


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the result of a fit: not where it runs, how it is watched or where it is kept."""
    kept = {name: value for name, value in config.items() if name not in {*NO_PART_OF_A_RUN, "config"}}
    kept["trainer"] = {k: v for k, v in dict(kept.get("trainer") or {}).items() if k not in NO_PART_OF_A_TRAINER}
    return kept


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of ``deciding``."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True, default=str).encode()).hexdigest()


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of ``folder``; empty if there is none, or none that can be read."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def run_name(method: str, concepts: Sequence[str], concept_set: ConceptSet) -> str:
    """``METHOD/CONCEPT``: where the runs of an edit lie below ``default_root_dir``.

    Concepts of another set than the default one have its name and a hash behind them: ``uce/dog@pets-5f2ff0c4``. So two
    sets of other names or content never share a folder, nor what resumes a job there.

    Args:
        method: The recipe's name.
        concepts: Names of the edited concepts.
        concept_set: Their set.
    """
    label, default = joint_name(concepts), load_concept_set(DEFAULT_SET)
    if (concept_set.name, concept_set.sha256) == (default.name, default.sha256):
        return f"{method}/{label}"
    key = hashlib.sha256("\0".join([*concepts, concept_set.name, concept_set.sha256]).encode()).hexdigest()[:8]
    return f"{method}/{label[: LONGEST_LABEL - 34]}@{file_name(concept_set.name)[:24]}-{key}"


def newest_run(folder: Path, sha256: str) -> Path | None:
    """The newest ``folder/version_N`` of the configuration ``sha256``, or None."""
    versions = [path for path in folder.glob("version_*") if path.name.removeprefix("version_").isdigit()]
    found = [path for path in versions if read_run(path).get("config_sha256") == sha256]
    return max(found, key=lambda path: int(path.name.removeprefix("version_")), default=None)


def newest_edit(folder: Path, command: str, concepts: Sequence[str]) -> Path:
    """The checkpoint of the newest ``folder/version_N``; says which one it is, and if it is not finished.

    Args:
        folder: ``METHOD/CONCEPT``.
        command: What needs it.
        concepts: Names of the edited concepts, if it is about any.

    Raises:
        UserError: There is none.
    """
    path = newest_checkpoint(folder)
    if path is None:
        label = folder.name.partition("@")[0]
        beside = sorted(other for other in folder.parent.glob("*") if other.name.partition("@")[0] == label)
        others = [other.as_posix() for other in beside if other != folder and newest_checkpoint(other)]
        raise UserError(
            f"{command} needs a run, and {folder} has none"
            f"{f' ({others[0]} is of another concept set)' if others else ''}: run `lit-unlearn fit` first, "
            "or give another run's file with --ckpt_path."
        )
    if read_run(run := run_folder(path) or path).get("state") == RUNNING:
        print(f"lit-unlearn: warning: {run} is not finished; its edit is that of the last checkpoint.", file=sys.stderr)
    print(f"The newest run{' of ' if concepts else ''}{', '.join(concepts)}: {path}")
    return path


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger of a new run, which can move on to the next version if another process is quicker."""

    def next_version(self) -> None:
        """Take the next version that no folder has."""
        self._version = self._get_next_version()


class Run:
    """A fit's claim on its folder.

    Args:
        folder: ``METHOD/CONCEPT/version_N``.
        sha256: Of the configuration.
    """

    def __init__(self, folder: Path, sha256: str) -> None:
        self.folder, self.sha256 = folder, sha256
        self._lock = FileLock(folder / LOCK_FILE)

    def claim(self) -> None:
        """Take the folder for this process, until it ends.

        Raises:
            UserError: Another process has it.
            WriteError: It cannot be written to.
        """
        is_new = not self.folder.exists()
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_it()
            for left in self.folder.glob("checkpoints/.*.tmp"):  # by a process that was killed
                remove(left)
        try:
            self._write(RUNNING)
        except WriteError:
            self.release()
            if is_new:  # nothing says whose it is, so no command would go on with it
                remove_if_possible(self.folder)
            raise

    def _lock_it(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            owner = read_run(self.folder).get("process", "another process")
            raise UserError(
                f"{self.folder} is being written by {owner}: wait until it ends, or start a separate run with another "
                "--method or --trainer.default_root_dir."
            ) from error

    def finish(self) -> None:
        """Say that the fit came to its end."""
        self._write(FINISHED)

    def release(self) -> None:
        """Leave the folder."""
        self._lock.release(force=True)

    def _write(self, state: str) -> None:
        content = {"state": state, "config_sha256": self.sha256, "process": f"process {os.getpid()}"}
        write_json(self.folder / RUN_FILE, content)
