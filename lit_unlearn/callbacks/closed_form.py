"""Applies a closed-form edit at the end of each epoch of ``ValueRefinement``: one epoch, one layer."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.modules import expect_module
from lit_unlearn.callbacks.numbers import solving, write_finite
from lit_unlearn.core.closed_form import (
    NullSpace,
    NullSpaceRule,
    RidgeRule,
    edit_report,
    least_squares_condition,
    least_squares_update,
    null_space,
    null_space_update,
)
from lit_unlearn.diffusion.parameters import layer_label
from lit_unlearn.methods.value_refinement import LayerState, ValueRefinement
from lit_unlearn.reports.figures import spectrum_figure
from lit_unlearn.system.devices import for_solving, solving_device


class ClosedFormEdit(L.Callback):
    """Base of the closed-form edits: solve for ``delta``, share it among processes, write it, report it.

    Stands before callbacks that look at the edited model: callbacks run in the order of the recipe.
    """

    @property
    def remedy(self) -> str:
        """What to do about a system that is ill-conditioned."""
        return f"raise {type(self).__name__}.ridge"

    def prepare(self, module: ValueRefinement) -> None:
        """Compute what serves all edits from ``module.moments``."""

    @abstractmethod
    def solve(self, module: ValueRefinement, state: LayerState, keys: Tensor, values: Tensor) -> Tensor:
        """Change of the weight (d_out, d_in), float64, for ``keys`` K1 (m, d_in) and ``values`` V1 (m, d_out)."""

    @abstractmethod
    def describe(
        self, module: ValueRefinement, state: LayerState, keys: Tensor, delta: Tensor, weight: Tensor
    ) -> dict[str, float]:
        """What to report of an edit; ``weight`` is the one before it."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        expect_module(self, pl_module, ValueRefinement, "writes what ValueRefinement has refined")

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not on_fit_start, where the module's own comes after the callbacks': its moments are there only now.
        assert isinstance(pl_module, ValueRefinement)
        with pl_module.pretrained.restored():
            self.retained_outputs = pl_module.retained_outputs()
        self.prepare(pl_module)
        if pl_module.progress["applied"] < pl_module.current_epoch:
            # Resumed from between a layer's last step and its edit: Lightning does not end that epoch again.
            self.edit(trainer, pl_module, pl_module.progress["applied"])

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ValueRefinement)
        self.edit(trainer, pl_module, pl_module.current_epoch)

    @torch.no_grad()
    def edit(self, trainer: L.Trainer, pl_module: ValueRefinement, epoch: int) -> None:
        """Write V1 into what ``epoch`` edits: one layer, or one after the other."""
        for state, values in pl_module.edits(epoch):
            self.write(trainer, pl_module, state, values, epoch // pl_module.epochs_per_round + 1)
        pl_module.state = None
        pl_module.progress["applied"] = epoch + 1
        if pl_module.progress["applied"] == trainer.max_epochs:  # before the last checkpoint, which holds the report
            pl_module.report["retained_state_drift"] = pl_module.retained_drift(self.retained_outputs)
            pl_module.report["weight_change_ratio"] = pl_module.pretrained.change_ratio()

    def write(
        self, trainer: L.Trainer, pl_module: ValueRefinement, state: LayerState, values: Tensor, round_number: int
    ) -> None:
        """Solve for V1, ``values`` (n, L, d_out), of one layer, write its weight and report."""
        keys, values = for_solving(state.keys[state.mask]), for_solving(values[state.mask])
        weight = for_solving(state.layer.weight.detach()).clone()

        def solve() -> Tensor:
            with solving(state.name):
                return self.solve(pl_module, state, keys, values)

        (delta,) = pl_module.solved_once([solve])  # one process decides: solvers may differ in the last bit
        write_finite(state.name, state.layer.weight, weight + delta.to(weight))
        report = self.describe(pl_module, state, keys, for_solving(state.layer.weight) - weight, weight)
        if pl_module.errors:  # none with values that are not refined
            report["first_error"], report["last_error"] = float(pl_module.errors[0]), float(pl_module.errors[-1])
        pl_module.report.setdefault("layers", {})[state.name] = {"round": round_number, **report}
        pl_module.log_dict({f"edit/{name}": value for name, value in report.items()}, rank_zero_only=True)


class NullSpaceEdit(ClosedFormEdit):
    """Edits within the null space of the retained keys (paper, Sec. 4): ``Δ = R K1ᵀ P (K1 K1ᵀ P + ridge I)⁻¹``.

    Args:
        threshold: Eigenvalues of ``K0 K0ᵀ`` below it span the null space; see ``rule``.
        rule: What the threshold is relative to: ``mean`` or ``max`` eigenvalue, ``absolute`` (on the mean second
            moment), ``energy`` (fraction of the trace kept out), ``count`` (number of directions).
        minimum: Take at least so many directions, the smallest.
        ridge: Weight of the penalty on the size of the edit; the paper uses 1, the authors' code 200.
        ridge_rule: ``absolute``, or ``mean_diagonal``: relative to the mean diagonal of ``K1ᵀ P K1``.

    Raises:
        EmptyNullSpaceError: No eigenvalue is below the threshold.
    """

    def __init__(
        self,
        threshold: float = 1e-2,
        rule: NullSpaceRule = "mean",
        minimum: int = 0,
        ridge: float = 1.0,
        ridge_rule: RidgeRule = "absolute",
    ) -> None:
        self.threshold, self.rule, self.minimum = threshold, rule, minimum
        self.ridge, self.ridge_rule = ridge, ridge_rule
        self.null_spaces: dict[str, NullSpace] = {}

    @override
    def prepare(self, module: ValueRefinement) -> None:
        # K0 is what the unedited model sees; an edit within the null space does not change it, so P serves all rounds.
        solve = {id(moment): partial(self.null_space_of, name, module) for name, (moment, _) in module.moments.items()}
        solved = dict(zip(solve, module.solved_once(list(solve.values())), strict=True))
        self.null_spaces = {name: NullSpace(*solved[id(moment)]) for name, (moment, _) in module.moments.items()}
        spectra = {name: [float(value) for value in space.eigenvalues] for name, space in self.null_spaces.items()}
        module.report["spectrum"] = spectra
        if isinstance(module.logger, TensorBoardLogger):
            layers = {name: layer_label(name) for name in spectra}
            figure = spectrum_figure(
                {label: spectra[name] for name, label in layers.items()},
                {label: self.null_spaces[name].cutoff for name, label in layers.items()},
            )
            module.logger.experiment.add_figure("edit/spectrum", figure)

    def null_space_of(self, name: str, module: ValueRefinement) -> tuple[Tensor, Tensor, float]:
        """The fields of the null space of what the layer ``name`` retains."""
        moment, count = module.moments[name]
        with solving(name):
            space = null_space(moment.to(solving_device(module.device)), self.threshold, self.rule, count, self.minimum)
        return space.basis.cpu(), space.eigenvalues.cpu(), space.cutoff  # a GPU holds one layer's at a time

    @override
    def solve(self, module: ValueRefinement, state: LayerState, keys: Tensor, values: Tensor) -> Tensor:
        weight = for_solving(state.layer.weight.detach())
        return null_space_update(weight, keys, values, self.null_spaces[state.name], self.ridge, self.ridge_rule)

    @override
    def describe(
        self, module: ValueRefinement, state: LayerState, keys: Tensor, delta: Tensor, weight: Tensor
    ) -> dict[str, float]:
        moment, _ = module.moments[state.name]
        return edit_report(weight, delta, keys, moment, self.null_spaces[state.name], self.ridge, self.ridge_rule)


class LeastSquaresEdit(ClosedFormEdit):
    """Edits by least squares over retained and edited keys, no projector (paper, Eq. 6; with ``retain_weight``, MEMIT).

    Args:
        ridge: Weight of the penalty on the size of the edit.
        retain_weight: Weight of the retained keys' second moment; MEMIT's lambda, 15000 on language models.
        moment: That moment as the ``sum`` over the retained keys (Eq. 6), or as their ``mean`` (MEMIT).

    Raises:
        ValueError: A weight is negative, or ``moment`` is neither.
    """

    def __init__(self, ridge: float = 1e-2, retain_weight: float = 1.0, moment: Literal["sum", "mean"] = "sum") -> None:
        for field, value in {"ridge": ridge, "retain_weight": retain_weight}.items():
            if not value >= 0:
                raise ValueError(f"{type(self).__name__}.{field}={value} must be zero or larger.")
        if moment not in ("sum", "mean"):
            raise ValueError(f"{type(self).__name__}.moment={moment!r} is unknown: choose sum or mean.")
        self.ridge, self.retain_weight, self.moment = ridge, retain_weight, moment

    @override
    def solve(self, module: ValueRefinement, state: LayerState, keys: Tensor, values: Tensor) -> Tensor:
        weight = for_solving(state.layer.weight.detach())
        return least_squares_update(weight, keys, values, self._retained(module, state), self.ridge, self.retain_weight)

    def _retained(self, module: ValueRefinement, state: LayerState) -> Tensor:
        """The retained keys' second moment, (d_in, d_in), as ``moment`` says."""
        moment, count = module.moments[state.name]
        return moment if self.moment == "sum" else moment / count

    @override
    def describe(
        self, module: ValueRefinement, state: LayerState, keys: Tensor, delta: Tensor, weight: Tensor
    ) -> dict[str, float]:
        moment = module.moments[state.name][0].to(delta)
        leak = ((delta @ moment) * delta).sum().clamp_min(0).sqrt() / ((weight @ moment) * weight).sum().sqrt()
        return {
            "leak": float(leak),
            "relative_norm": float(delta.norm() / weight.norm()),
            "condition_number": least_squares_condition(
                keys, self._retained(module, state), self.ridge, self.retain_weight
            ),
        }
