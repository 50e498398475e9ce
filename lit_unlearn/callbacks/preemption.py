"""After a signal, saves and stops a fit at the end of the step, or stops a test, and requeues the SLURM job."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.system.signals import Preempted, default_signals, note_signal, take_signal


class SaveOnSignal(L.Callback):
    """After a signal, saves ``checkpoints/last.ckpt`` at the end of the step, requeues the SLURM job, and stops.

    A test does not save anything except the pictures that ``UneditedPictures`` keeps: it is requeued and starts again.

    Saving inside a signal handler could hang or write an incomplete file; at the end of a step it is safe.

    Args:
        signals: Signals to wait for; SLURM sends the one given by ``sbatch --signal``. By default SIGUSR1, if the
            system has it.
        requeue: Whether to requeue the SLURM job, if this process belongs to one.

    Raises:
        ValueError: The system does not have this signal.
        Preempted: The run stops; raised on every process.
    """

    def __init__(self, signals: list[str] | None = None, requeue: bool = True) -> None:
        self.signals = signals or default_signals()
        self.requeue = requeue
        for name in self.signals:
            note_signal(name)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The last step of an epoch is followed by its edit and its checkpoint, and a checkpoint holds no gradients.
        between = (batch_idx + 1) % trainer.accumulate_grad_batches
        if trainer.is_last_batch or between or not self._told(trainer):
            return
        path = folder_of(trainer) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        # Not trainer.should_stop: the hooks at the end of an epoch would run and write an unfinished edit.
        self._stop(trainer, f"saved {path} at step {trainer.global_step}")

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # For epochs of one step this is the only possible moment, after the checkpoint of the epoch before.
        checkpoints = trainer.checkpoint_callback
        saved = isinstance(checkpoints, ModelCheckpoint) and checkpoints._last_global_step_saved == trainer.global_step
        if saved and trainer.global_step and self._told(trainer):
            self._stop(trainer, f"all is saved up to step {trainer.global_step}")

    @override
    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        # Without communication, since one process may have a batch more than another.
        if self._taken():
            if self.requeue and (job := slurm_job()):
                requeue(job)
            raise Preempted("Told to stop: the test has not written scores.")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Everything is saved, but there is no time left for the job's next command, such as a test.
        if self._told(trainer):
            self._requeue(trainer)

    def _stop(self, trainer: L.Trainer, what: str) -> NoReturn:
        self._requeue(trainer)
        trainer.strategy.barrier()  # a job may end all its processes as soon as one has ended
        raise Preempted(f"Told to stop: {what}.")

    def _told(self, trainer: L.Trainer) -> bool:
        told = self._taken()
        if trainer.world_size > 1:  # the signal may reach one process before another
            flag = torch.tensor(told, dtype=torch.int32, device=trainer.strategy.root_device)
            told = bool(trainer.strategy.reduce(flag, reduce_op="sum"))
        return told

    def _taken(self) -> bool:
        return any([take_signal(name) for name in self.signals])  # a list, so that every signal is taken

    def _requeue(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self.requeue and (job := slurm_job()):
            requeue(job)


def slurm_job() -> str | None:
    """Number of the SLURM job that this process belongs to, ``JOB`` or ``ARRAY_TASK``; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"\d+(_\d+)?", job) else None


def requeue(job: str) -> None:
    """Requeue ``job`` in SLURM; a failure is only a warning, since the checkpoint is already saved."""
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        rank_zero_warn(f"The job {job} could not be requeued ({error}): submit it again.")
        return
    if result.returncode:
        rank_zero_warn(f"The job {job} could not be requeued ({result.stderr.strip()}): submit it again.")
    else:
        rank_zero_info(f"Requeued the SLURM job {job}.")
