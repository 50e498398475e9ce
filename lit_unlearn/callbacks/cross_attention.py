"""Applies a closed form to the UNet's cross-attention at the end of the only epoch of a ``CrossAttentionEditor``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.modules import expect_module
from lit_unlearn.callbacks.numbers import write_finite
from lit_unlearn.methods.shared.cross_attention import CrossAttentionEditor


class CrossAttentionEdit(L.Callback):
    """Base of the closed forms on ``attn2.to_k`` and ``attn2.to_v``: solve, share among processes, write, report.

    Stands before callbacks that look at the edited model: callbacks run in the order of the recipe.
    """

    module_class: type[CrossAttentionEditor] = CrossAttentionEditor
    """The methods that it can edit."""
    remedy = "raise its ridge"
    """What to do about a system that is ill-conditioned."""

    @abstractmethod
    def solve(self, module: Any) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Changes (d_out, d_in), float64, of the edited weights by full name, and what to report of the edit."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        expect_module(self, pl_module, self.module_class, f"edits what {self.module_class.__name__} prepares")

    @override
    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CrossAttentionEditor)
        # One process decides: solvers may differ in the last bit.
        ((deltas, report),) = pl_module.solved_once([partial(self.solve, pl_module)])
        for name, layer in pl_module.layers.items():
            write_finite(name, layer.weight, layer.weight.to(deltas[name]) + deltas[name])
        pl_module.report.update(report)
        pl_module.report["weight_change_ratio"] = pl_module.pretrained.change_ratio()
