"""One folder per run: which process writes into it, whether the run is finished, and which run a command continues.

``RUN/run.json`` has the hash of the fit's configuration and its state. If a fit is killed, the state remains
``running``: the same command then continues this run from its last checkpoint. If a setting of the recipe, such as
``trainer.max_steps``, ended the fit before its last step, the state is ``stopped`` and ``run.json`` names the setting.
``RUN/.lock`` is locked while a fit writes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.edits.checkpoint import newest_checkpoint
from lit_unlearn.methods.shared.stack import Stack
from lit_unlearn.system.errors import UserError
from lit_unlearn.system.files import WriteError, naming, remove, remove_if_possible
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.names import LONGEST_LABEL, file_name, joint_name
from lit_unlearn.system.run_file import FINISHED, RUN_FILE, RUNNING, STOPPED, read_run

LOCK_FILE = ".lock"

DEFAULT_SET = "emoji20"
"""Runs with this concept set are named after the concepts alone."""

NO_PART_OF_A_RUN = {"ckpt_path", "overwrite", "fresh", "once", "weights_only"}
"""Options that do not change the result of a fit."""
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
    """The part of the configuration that determines the result of a fit: without devices, logging and folders."""
    kept = {name: value for name, value in config.items() if name not in {*NO_PART_OF_A_RUN, "config"}}
    kept["trainer"] = {k: v for k, v in dict(kept.get("trainer") or {}).items() if k not in NO_PART_OF_A_TRAINER}
    if isinstance(model := kept.get("model"), Mapping) and isinstance(given := model.get("init_args"), Mapping):
        kept["model"] = {**model, "init_args": {k: v for k, v in given.items() if k != "offload"}}
    return kept


def config_sha256(config: Mapping[str, Any], stack: Stack | None = None) -> str:
    """SHA-256 of ``deciding(config)``, and of the edits that the fit starts from."""
    content = deciding(config) | ({"stack": [link["sha256"] for link in stack.links]} if stack is not None else {})
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def run_name(method: str, concepts: Sequence[str], concept_set: ConceptSet) -> str:
    """``METHOD/CONCEPT``: the folder of an edit's runs, relative to ``default_root_dir``.

    For concept sets other than the default, the set's name and a hash follow: ``uce/dog@pets-5f2ff0c4``. So sets with
    different names or content never share a folder or the checkpoints in it.

    Args:
        method: The recipe's name.
        concepts: Names of the edited concepts.
        concept_set: The set that they belong to.
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
    """The checkpoint of the newest ``folder/version_N``; prints its path, and warns if the run is not finished.

    Args:
        folder: ``METHOD/CONCEPT``.
        command: The command that needs the checkpoint, for the message.
        concepts: Names of the edited concepts; empty if the run has none.

    Raises:
        UserError: There is no checkpoint.
    """
    path = newest_checkpoint(folder)
    if path is None:
        label = folder.name.partition("@")[0]
        same = [other for other in folder.parent.glob("*") if other.name.partition("@")[0] == label and other != folder]
        more = list(folder.parent.glob(f"*+{glob.escape(label)}"))  # on top of other edits
        kinds = {other: "another concept set" for other in same} | {other: "other concepts too" for other in more}
        beside = next((other for other in sorted(kinds) if newest_checkpoint(other)), None)
        raise UserError(
            f"{command} needs a run, and {folder} has none"
            f"{f' ({beside.as_posix()} is of {kinds[beside]})' if beside else ''}: run `lit-unlearn fit` first, "
            "or give another run's file with --ckpt_path."
        )
    print(f"The newest run{' of ' if concepts else ''}{', '.join(concepts)}: {path}")
    return path


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger for a new run; it can take the next version if another process has taken this one."""

    def next_version(self) -> None:
        """Take the next version for which no folder exists."""
        self._version = self._get_next_version()


class Run:
    """The folder of a fit, locked for one process.

    Args:
        folder: ``METHOD/CONCEPT/version_N``.
        sha256: Hash of the configuration, ``config_sha256``.
    """

    def __init__(self, folder: Path, sha256: str) -> None:
        self.folder, self.sha256 = folder, sha256
        self._lock = FileLock(folder / LOCK_FILE)

    def claim(self) -> None:
        """Lock the folder for this process until ``release``.

        Raises:
            UserError: Another process has locked the folder.
            WriteError: The folder cannot be written to.
        """
        is_new = not self.folder.exists()
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_it()
            for left in self.folder.glob("checkpoints/.*.tmp"):  # left behind by a process that was killed
                remove(left)
        try:
            self._write(RUNNING)
        except WriteError:
            self.release()
            if is_new:  # without run.json no command would continue it
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
        """Record that the fit is finished."""
        self._write(FINISHED)

    def stop(self, by: str) -> None:
        """Record that the fit ended before its last step, and what ended it."""
        self._write(STOPPED, stopped=by)

    def release(self) -> None:
        """Unlock the folder."""
        self._lock.release(force=True)

    def _write(self, state: str, **more: str) -> None:
        content = {"state": state, "config_sha256": self.sha256, "process": f"process {os.getpid()}", **more}
        write_json(self.folder / RUN_FILE, content)


def claim(trainer: Any, sha256: str, goes_on: bool) -> Run | None:
    """Lock the run's folder for the first process of the job; None in the other processes.

    None also if the recipe has another kind of logger, which decides itself where the run is kept.

    Args:
        trainer: A Lightning trainer.
        sha256: Hash of the configuration; empty if no run is kept.
        goes_on: Whether the folder is that of an earlier run.

    Raises:
        UserError: Another process writes the run.
        WriteError: The folder cannot be written to.
    """
    logger = trainer.logger
    if not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger) or not sha256:
        return None
    while True:
        run = Run(Path(trainer.log_dir or trainer.default_root_dir), sha256)
        try:
            run.claim()
        except UserError:
            if goes_on or not isinstance(logger, RunLogger):
                raise
            if read_run(run.folder).get("config_sha256") == sha256:
                raise  # the same command is already running
            logger.next_version()  # another command has taken this version in the meantime
        else:
            return run
