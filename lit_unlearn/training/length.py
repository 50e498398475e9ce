"""The length of a fit: whether it reached its end, what stopped it early, and how to continue a finished fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from typing_extensions import override

from lit_unlearn.edits.checkpoint import load_checkpoint
from lit_unlearn.methods.rename_tokens import RenameTokens
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system.errors import UserError

OWN_LENGTH = (ClosedFormMethod, RenameTokens)
"""Methods that set the length of their fit themselves."""


def takes_one_step(method: type) -> bool:
    """Whether an epoch of ``method`` is one step that trains nothing."""
    if issubclass(method, ClosedFormMethod):
        return method.training_step is ClosedFormMethod.training_step
    return issubclass(method, RenameTokens)


def stopped_early(trainer: L.Trainer, module: L.LightningModule) -> str | None:
    """What ended a fit before its last step: ``after 2 of 4 steps, by trainer.max_steps=2``; None if it is complete.

    If ``max_epochs`` is not set, ``max_steps`` is the length of the fit.
    """
    loop, steps, max_epochs = trainer.fit_loop, trainer.global_step, trainer.max_epochs or 0
    epochs: Any = loop.epoch_progress.current
    whole = epochs.processed >= max_epochs and loop.epoch_loop.batch_progress.is_last_batch
    if max_epochs == -1:
        whole = 0 <= trainer.max_steps <= steps
    if whole or getattr(module, "out_of_time", False):  # the learning rate of DiTTraining has come to zero
        return None
    if trainer.should_stop:
        from lit_unlearn.methods.uce_debias import UCEDebias  # needed for such a fit only

        if isinstance(module, UCEDebias):  # it ends itself when close enough
            return None
    cause = f"trainer.max_steps={trainer.max_steps}"
    if trainer.should_stop:
        kinds = {type(callback): callback for callback in trainer.callbacks}  # type: ignore[attr-defined]
        timer, early = kinds.get(Timer), kinds.get(EarlyStopping)
        cause = "a callback that asked for it" if early is None else f"EarlyStopping on {early.monitor}"
        if timer is not None and (timer.time_remaining() or 0) <= 0:
            cause = "trainer.max_time, or a Timer"
    of = f" of {max_epochs * _optimizer_steps(trainer.num_training_batches, trainer)}" if max_epochs > 0 else ""
    return f"after {steps}{of} steps, by {cause}"


def how_to_go_on(trainer: L.Trainer, module: L.LightningModule) -> str:
    """Tell the user how to continue a fit that was stopped early."""
    if isinstance(module, OWN_LENGTH) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return "start a new one without that, since its edit was written before all steps were done"
    return "with a longer one, or without it, --ckpt_path last goes on"


def _optimizer_steps(batches: float, trainer: Any) -> int:
    return math.ceil(batches / trainer.accumulate_grad_batches)


@dataclass(frozen=True)
class Progress:
    """How much of its fit a checkpoint has done.

    Attributes:
        path: The checkpoint.
        names: The edited weights.
        epochs: Number of finished epochs.
        batches: Number of batches seen, over all epochs.
        steps: Number of optimizer steps taken.
        cut: Whether its last epoch ended before all of its batches were seen.
        schedule: Number of steps of the learning rate schedule; None if the schedule has no end.
    """

    path: str | Path
    names: list[str]
    epochs: int
    batches: int
    steps: int
    cut: bool
    schedule: int | None

    @classmethod
    def of(cls, path: str | Path, names: list[str]) -> Progress:
        """Read the progress from the checkpoint ``path`` of a fit that edits the weights ``names``.

        Raises:
            UserError: The file is not a checkpoint of a fit.
        """
        content = load_checkpoint(path)
        try:
            loop = content["loops"]["fit_loop"]
            epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
            schedules = [schedule.get("total_steps") for schedule in content.get("lr_schedulers", [])]
            return cls(
                path,
                names,
                epoch["processed"],
                batch["total"]["processed"],
                content["global_step"],
                epoch["processed"] == epoch["started"] and not batch["is_last_batch"],
                min((steps for steps in schedules if steps is not None), default=None),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"ckpt_path={path} does not say how far its fit has come: start a new one.") from error

    def left(self, module: L.LightningModule, config: Any) -> bool:
        """Whether a fit with ``config`` that continues from the checkpoint has steps left.

        Args:
            module: The method; ``configure_model`` need not have been called.
            config: The configuration of ``fit``.

        Raises:
            UserError: A fit cannot continue from this checkpoint.
        """
        if isinstance(module, OWN_LENGTH):
            if self.cut:
                raise UserError(
                    f"fit: {self.path} cannot go on: it ended in the middle of a layer, whose edit is written; start a "
                    "new fit with --fresh and without --ckpt_path."
                )
            assert isinstance(module, DiffusionEditor)
            module.edited_names = self.names  # configure_model would find the same
            return self.epochs < (module.fit_plan.epochs or 1)
        trainer, epoch = config.trainer, steps_per_epoch(config.data.init_args)
        ends = [] if trainer.max_steps == -1 else [trainer.max_steps]
        if trainer.max_epochs not in (None, -1) and epoch:
            if self.batches >= trainer.max_epochs * epoch:
                return False
            ends.append(_optimizer_steps(epoch, trainer) * trainer.max_epochs)
        if ends and self.steps >= min(ends):
            return False
        if self.schedule is not None and ends and min(ends) > self.schedule:
            raise UserError(
                f"fit: {self.path} cannot go on to step {min(ends)}: the schedule of its learning rate ends at step "
                f"{self.schedule}; start a new fit of that length with --fresh and without --ckpt_path."
            )
        return True

    def nothing_left(self, module: L.LightningModule) -> str:
        """The sentence which says that the fit is complete and how to make it longer."""
        longer = "raise data.steps, trainer.max_epochs or trainer.max_steps, whichever ends it, to go on"
        if isinstance(module, OWN_LENGTH):
            longer = "raise model.rounds to go on" if hasattr(module, "rounds") else "its length is its own"
        return f"{self.path} is at its end after {self.steps} steps, so there is nothing more to do: {longer}"


def steps_per_epoch(data: Mapping[str, Any]) -> int | None:
    """Batches per epoch, from the settings of our data modules; None for other data modules."""
    return data.get("steps") or data.get("steps_per_epoch")


class GoOn(L.Callback):
    """Corrects the epoch and batch counters of a checkpoint if the length of an epoch has changed.

    Example: a fit ended after one epoch of 100 steps. With 200 steps per epoch it continues in the middle of the first
    epoch, where Lightning would begin the second one or end. Counters that are right already are not changed.

    Args:
        steps: Batches per epoch.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        done = batch["total"]["processed"]
        inside = batch["current"]["processed"] if epoch["started"] > epoch["processed"] else 0
        if epoch["processed"] * self.steps + inside == done:
            return
        epochs, inside = divmod(done, self.steps)
        if inside:  # as saved at the end of a batch
            count = {"ready": epochs + 1, "started": epochs + 1, "processed": epochs, "completed": epochs}
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds one on loading
        else:  # as saved at the end of an epoch
            count = {"ready": epochs, "started": epochs, "processed": epochs, "completed": epochs - 1}
        loop["epoch_progress"] = {"total": dict(count), "current": dict(count)}
        seen = dict.fromkeys(("ready", "started", "processed"), inside or self.steps)
        batch["current"] = {**seen, "completed": seen["ready"] - bool(inside)}
        batch["total"] = {**dict.fromkeys(seen, done), "completed": done - bool(inside)}
        batch["is_last_batch"] = not inside
