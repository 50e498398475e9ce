"""Applies closed-form edits: at the end of an epoch it solves for the method's writes and writes the weights.

    Trainer(callbacks=[ClosedFormEdit(NullSpace(threshold=0.02))])

On the command line the recipe's key ``edit`` names the solver, and this callback is added automatically.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.modules import expect_module
from lit_unlearn.callbacks.numbers import NumericalError, write_finite
from lit_unlearn.core.null_space import NullSpaceBasis
from lit_unlearn.core.reach import reach_report, retained_directions
from lit_unlearn.core.solvers import Retained, Solved, Solver, UnsolvableError, Write
from lit_unlearn.core.thin import NullSpaceOfKeys
from lit_unlearn.diffusion.parameters import layer_label
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod

REACHES = ("reach", "least_reach")
"""Entries about the reach in the report on a layer, which further rounds keep."""


class ClosedFormEdit(L.Callback):
    """Solves for a method's writes, sends the changes to all processes, applies them and reports about them.

    List it before callbacks that use the edited model, since callbacks run in the order of the recipe.

    Args:
        solver: The closed form, with its settings.
    """

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self._prepared: WeakSet[Retained] = WeakSet()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        expect_module(self, pl_module, ClosedFormMethod, "writes the weights of closed-form methods")
        assert isinstance(pl_module, ClosedFormMethod)
        if stage == TrainerFn.FITTING:
            pl_module.edit, pl_module.remedy = self.solver.settings(), self.solver.remedy

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not on_fit_start: there callbacks run before the module, which gathers its retained keys in its own hook.
        assert isinstance(pl_module, ClosedFormMethod)
        pl_module.before_writes()
        self.prepare(pl_module)
        if pl_module.written_epochs() < pl_module.current_epoch:
            # Resumed between a layer's last step and its edit: Lightning does not end that epoch again.
            self.edit(trainer, pl_module, pl_module.written_epochs())

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ClosedFormMethod)
        self.edit(trainer, pl_module, pl_module.current_epoch)

    def prepare(self, pl_module: ClosedFormMethod) -> None:
        """Let the solver prepare for the retained keys that the method holds now.

        Raises:
            NumericalError: The solver cannot use them.
        """
        try:
            weights = {name: pl_module.layers[name].weight for name in pl_module.retained}
            share = pl_module.processes.solved_once
            spaces = self.solver.prepare(pl_module.retained, share, pl_module.device, weights)
        except UnsolvableError as error:
            raise NumericalError(str(error)) from error
        self._prepared = WeakSet(pl_module.retained.values())
        if spaces:
            self._store_spectra(pl_module, spaces)

    @torch.no_grad()
    def edit(self, trainer: L.Trainer, pl_module: ClosedFormMethod, epoch: int) -> None:
        """Apply the writes of ``epoch``: to one layer, to layers one after the other, or to all at once."""
        with pl_module.edited_in_place():
            for writes in pl_module.writes(epoch):
                self.write(pl_module, writes, epoch)
                del writes  # with it, its retained keys can be released before the next are gathered
        is_last = epoch + 1 == trainer.max_epochs
        if is_last:
            self.solver.forget()
        pl_module.after_writes(epoch, is_last)

    def write(self, pl_module: ClosedFormMethod, writes: Sequence[Write], epoch: int) -> None:
        """Solve for ``writes`` together, write the weights and report.

        Raises:
            NumericalError: The system cannot be solved, or a weight would not be finite.
        """
        if not self._prepared.issuperset(write.retained for write in writes):
            self.prepare(pl_module)
        # One process solves for all, since results of different processes may differ in the last bit. Another one
        # computes the reaches meanwhile.
        tasks: list[Callable[[], Any]] = [partial(self._timed, writes), partial(self.reaches, pl_module, writes)]
        (solved, seconds), reaches = pl_module.processes.solved_once(tasks)
        seconds += pl_module.report.get("solve_seconds", 0.0)
        reports = {}
        for write, one in zip(writes, solved, strict=True):
            weight = pl_module.layers[write.name].weight
            write_finite(write.name, weight, write.weight.to(one.change) + one.change)
            reports[write.name] = pl_module.report_of(write, one.report, epoch)
        known = [
            {name: value for name, value in one.items() if isinstance(value, float | int)} for one in reports.values()
        ]
        worst = {f"edit/{name}": float(max(one[name] for one in known)) for name in known[0] if name != "round"}
        layers = pl_module.report.setdefault("layers", {})
        layers.update({name: report | reaches[name] for name, report in reports.items()})
        pl_module.report["solve_seconds"] = seconds
        if medians := [layer["reach"] for layer in layers.values() if "reach" in layer]:
            worst["edit/reach"] = pl_module.report["reach"] = min(medians)
        pl_module.log_dict(worst, rank_zero_only=True)

    def reaches(self, pl_module: ClosedFormMethod, writes: Sequence[Write]) -> dict[str, dict[str, float]]:
        """The reach of each map that is written, by its name (see ``core.reach``).

        It is that of the first round, since further rounds have keys of a model that is edited already.
        """
        found, spans = {}, dict[Retained, Tensor]()
        for write in writes:
            if (earlier := pl_module.report.get("layers", {}).get(write.name)) is not None:
                found[write.name] = {key: earlier[key] for key in REACHES if key in earlier}
                continue
            retained, device = write.retained, write.weight.device
            span: NullSpaceBasis | Tensor | None = self.solver.null_space_of(retained)
            if span is None and retained.moment is not None:
                if retained not in spans:
                    spans[retained] = retained_directions(retained.moment.to(device))
                span = spans[retained]
            weight = pl_module.pretrained.values[write.name].to(device)
            found[write.name] = {} if span is None else reach_report(write, weight, span)
        return found

    def _timed(self, writes: Sequence[Write]) -> tuple[list[Solved], float]:
        """What ``solve`` returns, and its seconds."""
        started = time.perf_counter()
        return self.solve(writes), time.perf_counter() - started

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        """Solve for ``writes``.

        Raises:
            NumericalError: They cannot be solved for.
        """
        try:
            return self.solver.solve(writes)
        except UnsolvableError as error:
            raise NumericalError(str(error)) from error

    def _store_spectra(self, module: ClosedFormMethod, spaces: Mapping[Retained, NullSpaceOfKeys]) -> None:
        """Store the spectrum of K0 K0ᵀ of each layer, and what of it is retained, in the report."""
        of_layers = {name: spaces[own] for name, own in module.retained.items() if own in spaces}
        spectra = {name: [float(value) for value in space.eigenvalues] for name, space in of_layers.items()}
        module.report.setdefault("spectrum", {}).update(spectra)
        module.report.setdefault("cutoffs", {}).update({name: float(space.cutoff) for name, space in of_layers.items()})

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plot the spectra, when the edit is written."""
        report = getattr(pl_module, "report", {})
        spectra, cutoffs = report.get("spectrum"), report.get("cutoffs")
        if cutoffs and spectra and isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            from lit_unlearn.reports.figures import spectrum_figure  # matplotlib takes half a second

            figure = spectrum_figure(
                {layer_label(name): spectra[name] for name in cutoffs},
                {layer_label(name): cutoff for name, cutoff in cutoffs.items()},
            )
            trainer.logger.experiment.add_figure("edit/spectrum", figure)
