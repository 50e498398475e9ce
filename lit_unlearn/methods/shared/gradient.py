"""Base of the methods that train the pipeline's weights by gradient descent: ESD, Concept Ablation, SISS and others."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor

from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.methods.shared.editor import DiffusionEditor


class GradientEditor(DiffusionEditor):
    """Trains the edited weights by gradient descent; a method adds ``training_step``, its paper's loss.

    A method that edits concepts must list it before ``ConceptEditor`` among its bases.

    Args:
        optimizer: Optimizer of the edited weights.
        lr_scheduler: Schedule of its learning rate, stepped after every optimizer step; null keeps it constant.
        seed: Seed of all random numbers of a step: timesteps, noise, prompts.
        **kwargs: See ``ConceptEditor`` and ``DiffusionEditor``.
    """

    num_pairs: int | None = None
    """Number of the method's own pairs, if it does not use the concept set's pairs of edit and target prompts."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, seed

    @property
    def fit_plan(self) -> FitPlan:
        """The method's own pairs instead of the concept set's, if it has any, in an order that depends on its seed."""
        return FitPlan(num_pairs=self.num_pairs, seed=self.seed)

    def configure_model(self) -> None:
        """Load the pipeline and make the edited weights trainable."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        parameters = self.pipeline.named_parameters()
        for name in self.edited_names:
            parameters[name].requires_grad_(True)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the edited weights."""
        parameters = self.pipeline.named_parameters()
        return self.optimizer([parameters[name] for name in self.edited_names])

    def configure_optimizers(self) -> Any:
        """The optimizer of the edited weights, with its schedule if there is one."""
        optimizer = self.make_optimizer()
        if self.lr_scheduler is None:
            return optimizer
        schedule = LRSchedulerConfig(self.lr_scheduler(optimizer), interval="step")
        # Omitted if it is the default, since Lightning would warn that manual optimization ignores it.
        defaults = {field.name: field.default for field in fields(schedule)}
        chosen = {name: value for name, value in vars(schedule).items() if value != defaults[name]}
        return {"optimizer": optimizer, "lr_scheduler": chosen}

    def generators(self, batch: Tensor, batch_idx: int) -> list[torch.Generator]:
        """A generator for each item of ``batch`` (B,), which holds the data's numbers of the items.

        It depends only on seed, epoch, step and item, so the loss is the same with any number of processes.
        """
        return [seeded(self.seed, self.current_epoch, batch_idx, item) for item in batch.tolist()]

    def on_train_epoch_end(self) -> None:
        """Report how much the weights have changed, before the checkpoint that contains the report."""
        self.report["weight_change_ratio"] = self.pretrained.change_ratio()
