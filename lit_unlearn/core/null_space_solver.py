"""The null-space edit as a solver (paper, Sec. 4), with the choice of the null space that belongs to it.

    edit: {class_path: NullSpace, init_args: {rule: soft, threshold: 1.0, ridge: null, tolerance: 0.06}}

Data flow: ``prepare`` finds the null space of each site's retained keys, as ``rule`` and ``threshold`` say. With a
``tolerance``, each solve narrows it until the change moves the retained outputs by no more than that. With
``forget_unused``, what no retained key uses is taken out of the weight before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lit_unlearn.core.closed_form import NullSpaceSystem, RidgeRule, edit_report, null_space_coefficients
from lit_unlearn.core.key_sums import KeySums
from lit_unlearn.core.null_space import NullSpaceBasis, null_space, soft_null_space
from lit_unlearn.core.null_space_system import system_of
from lit_unlearn.core.retained_outputs import Known, RetainedOutputs, Solution, known_of
from lit_unlearn.core.solvers import Retained, Share, Solved, Solver, Write, each, naming_weight, sums_of
from lit_unlearn.core.thin import (
    NullSpaceOfKeys,
    ThinMoment,
    ThinNullSpace,
    outputs_energy,
    thin_null_space,
    thin_soft_null_space,
)
from lit_unlearn.system.devices import solving_device


class SharedSystem(NamedTuple):
    """The system of some keys and retained keys, for every solve with these very tensors.

    Attributes:
        keys: K1, (m, d_in).
        version: How often the keys had been changed in place.
        retained: The retained keys.
        ridge: Ridge and its rule.
        system: The system.
        moment: K1 K1ᵀ, (d_in, d_in), float64, if the keys are many.
        anchors: The anchors K1* of the write that it was made for, and how often they had been changed in place.
        moved: (K1* − K1) K1ᵀ, (d_in, d_in), float64, if the keys are many and there are anchors.
    """

    keys: TensorWeakRef
    version: int
    retained: Retained
    ridge: tuple[float | None, RidgeRule]
    system: NullSpaceSystem
    moment: Tensor | None
    anchors: tuple[TensorWeakRef, int] | None = None
    moved: Tensor | None = None

    def suits(self, write: Write, ridge: tuple[float | None, RidgeRule]) -> bool:
        """Whether ``write`` has this system if it is solved with this ``ridge``."""
        same = self.keys() is write.keys and self.version == write.keys._version and self.retained is write.retained
        return same and self.ridge == ridge and self.system.device == write.weight.device

    def moved_of(self, write: Write) -> Tensor | None:
        """``moved`` if it is that of the anchors of ``write``."""
        if self.anchors is None or write.anchors is None:
            return None
        anchors, version = self.anchors
        return self.moved if anchors() is write.anchors and version == write.anchors._version else None


class NullSpace(Solver):
    """Edits within the null space of the retained keys (paper, Sec. 4): ``Δ = R K1ᵀ P (K1 K1ᵀ P + ridge I)⁻¹``.

    Args:
        threshold: Eigenvalues of ``K0 K0ᵀ`` below it span the null space; see ``rule``.
        rule: What the threshold is relative to: ``mean`` or ``max`` eigenvalue, ``absolute`` (on the mean second
            moment), ``energy`` (fraction of the trace kept out), ``count`` (number of directions). ``soft``: relative
            to the mean eigenvalue, but without a cut: ``P = c (K0 K0ᵀ + c I)⁻¹`` with c = threshold × mean.
        minimum: Use at least this many directions, those with the smallest eigenvalues; not with ``soft``.
        ridge: Weight of the penalty on the size of the edit; the paper uses 1, the authors' code 200. null, only with
            ``soft``, takes c: edited and retained keys then have the same weight.
        ridge_rule: ``absolute``, or ``mean_diagonal``: relative to the mean diagonal of ``K1ᵀ P K1``.
        forget_unused: First take out of the weight what no retained key uses, ``W − W P``, so that only the retained
            prompts and the new values are left in it. A learned token finds less of the concept; prompts that nothing
            retains suffer.
        tolerance: The largest change of the retained outputs, ``||Δ K0|| / ||W K0||``; the null space is narrowed,
            site by site, until a change stays within it. null sets none.

    Raises:
        EmptyNullSpaceError: No eigenvalue is below the threshold.
        ValueError: Settings contradict each other.
    """

    def __init__(
        self,
        threshold: float = 1e-2,
        rule: Literal["max", "mean", "absolute", "energy", "count", "soft"] = "mean",
        minimum: int = 0,
        ridge: float | None = 1.0,
        ridge_rule: RidgeRule = "absolute",
        forget_unused: bool = False,
        tolerance: float | None = None,
    ) -> None:
        if rule == "soft" and minimum:
            raise ValueError(f"edit.minimum={minimum} has no effect with rule=soft, which has no cut: leave it out.")
        if ridge is None and (rule != "soft" or ridge_rule != "absolute"):
            raise ValueError("edit.ridge=null is possible with rule=soft and ridge_rule=absolute only: give a number.")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"edit.tolerance={tolerance} must be positive, or null for no bound.")
        self.threshold, self.rule, self.minimum = threshold, rule, minimum
        self.ridge, self.ridge_rule = ridge, ridge_rule
        self.forget_unused, self.tolerance = forget_unused, tolerance
        self.null_spaces: MutableMapping[Retained, NullSpaceOfKeys] = {}
        self.outputs = RetainedOutputs()
        self.systems: list[SharedSystem] = []

    def __getstate__(self) -> dict[str, Any]:
        """With the null spaces in a plain dictionary, which can be pickled."""
        return {**vars(self), "null_spaces": dict(self.null_spaces)}

    def prepare(
        self,
        retained: Mapping[str, Retained],
        share: Share,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Mapping[Retained, NullSpaceOfKeys]:
        """Find the null spaces, once: edits within them do not change the retained outputs, so K0 stays valid.

        Each is released together with the retained keys that it belongs to.
        """
        super().prepare(retained, share, device)
        names: dict[Retained, str] = {}
        for name, own in retained.items():
            names.setdefault(own, name)
        found = share([partial(self._null_space_of, name, own, solving_device(device)) for own, name in names.items()])
        self.null_spaces = WeakKeyDictionary(zip(names, map(self._made, found), strict=True))
        self.outputs = RetainedOutputs()
        self.systems = []
        if weights is not None and not self.forget_unused:
            sizes = [partial(_known_of, weights[name], own, solving_device(device)) for name, own in retained.items()]
            self.outputs.remember(dict(zip(retained, share(sizes), strict=True)))
        return self.null_spaces

    def _null_space_of(
        self, name: str, retained: Retained, device: torch.device
    ) -> tuple[Tensor, Tensor, float, int | None]:
        """The directions, eigenvalues and cutoff of a null space, and its dimension if it is a thin one."""
        assert retained.moment is not None
        moment = retained.moment.to(device)
        space: NullSpaceOfKeys
        with naming_weight(name):
            if isinstance(moment, ThinMoment):
                if self.rule == "soft":
                    space = thin_soft_null_space(moment, self.threshold)
                else:
                    space = thin_null_space(moment, self.threshold, self.rule, retained.count, self.minimum)
            elif self.rule == "soft":
                space = soft_null_space(moment, self.threshold)
            else:
                space = null_space(moment, self.threshold, self.rule, retained.count, self.minimum)
        # On the CPU, so that a GPU holds only one at a time.
        if isinstance(space, ThinNullSpace):
            return space.used.cpu(), space.eigenvalues.cpu(), space.cutoff, space.dimension
        return space.basis.cpu(), space.eigenvalues.cpu(), space.cutoff, None

    def _made(self, found: tuple[Tensor, Tensor, float, int | None]) -> NullSpaceOfKeys:
        directions, eigenvalues, cutoff, dimension = found
        soft = self.rule == "soft"
        if dimension is None:
            return NullSpaceBasis(directions, eigenvalues, cutoff, soft)
        return ThinNullSpace(directions, eigenvalues, cutoff, dimension, soft)

    def null_space_of(self, retained: Retained) -> NullSpaceBasis | Tensor:
        """See ``Solver.null_space_of``; of a soft one, the directions that are at least half free."""
        space = self.null_spaces[retained]
        return space.span() if isinstance(space, ThinNullSpace) else space.cut()

    def solve(self, writes: Sequence[Write]) -> list[Solved]:
        """See ``Solver.solve``; maps with the same keys and retained keys share the system, which is built once.

        So do further calls, if the writes say that they share their keys (``Write.shared``), until ``forget``.
        """
        self.systems = [shared for shared in self.systems if shared.keys() is not None]
        return each(writes, partial(self._solve, []))

    def forget(self) -> None:
        """See ``Solver.forget``."""
        self.systems = []

    def _solve(self, of_this_call: list[SharedSystem], write: Write) -> Solved:
        space = self.null_spaces[write.retained]
        if self.tolerance is not None:  # each map has its own null space
            # What is forgotten depends on the null space, so the residual does.
            sums = None if self.forget_unused else sums_of(write)
            space = self._within_tolerance(write, space, sums)
            change, solution, _ = self._change(write, space, sums=sums)
        else:
            ridge = self.ridge, self.ridge_rule
            known = next((one for one in (*self.systems, *of_this_call) if one.suits(write, ridge)), None)
            change, solution, sums = self._change(write, space, known)
            if known is None:
                (self.systems if write.shared else of_this_call).append(_shared(write, ridge, solution.system, sums))
        assert write.retained.moment is not None
        delta, kept = write.rounded(change), write.retained.moment.to(write.weight)
        leak = None
        if not self.forget_unused:  # which changes the weight by more than the solution
            leak = self.outputs.leak(write.name, write.weight, delta, kept, solution)
        report = edit_report(write.weight, delta, write.keys, kept, space, system=solution.system, leak=leak)
        if self.tolerance is not None:
            report["cutoff"] = space.cutoff / float(space.eigenvalues.mean())
        return Solved(change, report)

    def _ridge(self, space: NullSpaceOfKeys) -> float:
        return space.cutoff if self.ridge is None else self.ridge

    def _change(
        self,
        write: Write,
        space: NullSpaceOfKeys,
        known: SharedSystem | None = None,
        sums: KeySums | None = None,
    ) -> tuple[Tensor, Solution, KeySums | None]:
        """The change of the weight (d_out, d_in), the part of it that was solved, within ``space``, and the sums.

        ``sums`` are given if they are known already.
        """
        weight = write.weight
        if self.forget_unused:
            if isinstance(space, ThinNullSpace):
                weight = space.to(weight).across(weight)
            else:
                factor = space.basis.to(weight)
                weight = weight - (weight @ factor) @ factor.mT
        if sums is None:
            changed = None if weight is write.weight else weight
            sums = sums_of(write, changed, known and known.moment, known and known.moved_of(write))
        if known is None:
            keys, moment = write.keys.to(weight.device), None if sums is None else sums.moment
            system = system_of(keys, space, self._ridge(space), self.ridge_rule, moment=moment)
        else:
            system = known.system
        if sums is None:
            coefficients = null_space_coefficients(weight, write.keys, write.wanted(), system)
        else:
            coefficients = system.coefficients_of_sums(sums.residual)
        solution = Solution(system.change(coefficients), coefficients, system, system.space or space)
        whole = solution.change + (weight - write.weight) if self.forget_unused else solution.change
        return whole, solution, sums

    def _within_tolerance(self, write: Write, widest: NullSpaceOfKeys, sums: KeySums | None) -> NullSpaceOfKeys:
        """The widest null space, up to ``widest``, whose change moves the retained outputs by at most ``tolerance``.

        It is found by bisection, so it is the widest if a wider null space moves them more, as it does but for small
        exceptions.

        Raises:
            ValueError: Even the narrowest one moves them more.
        """
        assert self.tolerance is not None and write.retained.moment is not None
        moment = write.retained.moment.to(write.weight)
        present = outputs_energy(write.weight, moment).sqrt()

        def leak(cutoff: float) -> float:
            try:
                change, _, _ = self._change(write, widest.narrowed(cutoff), sums=sums)
            except ValueError:  # so narrow that no edited key has a part in it
                return 0.0
            return float(outputs_energy(change, moment).sqrt() / present)

        cutoffs = widest.narrower_cutoffs()
        least, above = -1, len(cutoffs)  # cutoffs[least] is within the tolerance, cutoffs[above] is not
        while above - least > 1:
            middle = (least + above) // 2
            least, above = (middle, above) if leak(cutoffs[middle]) <= self.tolerance else (least, middle)
        if least < 0:
            needed = leak(cutoffs[0])
            raise ValueError(
                f"edit.tolerance={self.tolerance:g} is less than {needed:.2g}, by which even the narrowest null space "
                "moves the retained outputs: raise it, or retain fewer prompts"
            )
        return widest.narrowed(cutoffs[least])


def _shared(
    write: Write, ridge: tuple[float | None, RidgeRule], system: NullSpaceSystem, sums: KeySums | None
) -> SharedSystem:
    """``system`` and ``sums`` of ``write``, for other writes with the same tensors."""
    keys, anchors = write.keys, write.anchors
    own = None if anchors is None else (TensorWeakRef(anchors), anchors._version)
    moment, moved = (None, None) if sums is None else (sums.moment, sums.moved)
    return SharedSystem(TensorWeakRef(keys), keys._version, write.retained, ridge, system, moment, own, moved)


def _known_of(weight: Tensor, retained: Retained, device: torch.device) -> Known:
    """The size of the outputs of W at the retained keys, before any edit."""
    assert retained.moment is not None
    return known_of(weight.detach().to(device).double(), retained.moment.to(device))
