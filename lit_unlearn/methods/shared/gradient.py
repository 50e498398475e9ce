"""What the methods share that train weights of the pipeline themselves: ESD, Concept Ablation, Forget-Me-Not, SISS."""

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

    To stand before ``ConceptEditor`` among the bases of a method that edits concepts.

    Args:
        optimizer: Optimizer of the edited weights.
        lr_scheduler: Schedule of its learning rate, stepped after every optimizer step; null keeps it constant.
        seed: Seed of everything that a step draws: timesteps, noise, prompts.
        **kwargs: See ``ConceptEditor`` and ``DiffusionEditor``.
    """

    num_pairs: int | None = None
    """Pairs that the data numbers, if they are not the concept set's pairs of edit and target prompts."""

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
        """Other pairs than those of the concept set, if the method has such, in an order of its own seed."""
        return FitPlan(num_pairs=self.num_pairs, seed=self.seed)

    def configure_model(self) -> None:
        """Load the pipeline and let the edited weights learn."""
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
        # Of what is left at its default, Lightning would warn that manual optimization ignores it.
        defaults = {field.name: field.default for field in fields(schedule)}
        chosen = {name: value for name, value in vars(schedule).items() if value != defaults[name]}
        return {"optimizer": optimizer, "lr_scheduler": chosen}

    def generators(self, batch: Tensor, batch_idx: int) -> list[torch.Generator]:
        """A generator for each item of ``batch`` (B,), numbered as the data does.

        It depends on seed, epoch, step and item alone, so any number of processes descends the same loss.
        """
        return [seeded(self.seed, self.current_epoch, batch_idx, item) for item in batch.tolist()]

    def on_train_epoch_end(self) -> None:
        """Report how far the weights have moved, before the checkpoint that holds the report."""
        self.report["weight_change_ratio"] = self.pretrained.change_ratio()
