"""Applies SPEED's closed form at the end of the only epoch of a ``SPEED`` method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.cross_attention import CrossAttentionEdit
from lit_unlearn.callbacks.numbers import solving
from lit_unlearn.core.speed import (
    augmented,
    erasing_update,
    most_influenced,
    relative_output,
    retained_null_space,
    speed_condition,
    speed_update,
)
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.methods.speed import SPEED, SPEEDKeys
from lit_unlearn.system.devices import for_solving


class SPEEDEdit(CrossAttentionEdit):
    """Edits each matrix in the null space of its own refined retain set; all settings are the module's.

    Raises:
        EmptyNullSpaceError: No eigenvalue is below the threshold.
    """

    module_class = SPEED
    remedy = "raise model.retain_scale"

    @override
    def solve(self, module: SPEED) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        keys = module.keys()
        deltas, layers = {}, {}
        for number, (name, layer) in enumerate(module.layers.items()):
            with solving(name):
                deltas[name], layers[name] = self.solve_layer(module, keys, layer.weight.detach(), number)
        means = {key: sum(layer[key] for layer in layers.values()) / len(layers) for key in next(iter(layers.values()))}
        module.log_dict({f"edit/{key}": value for key, value in means.items()}, rank_zero_only=True)
        return deltas, {"layers": layers, "edited_keys": len(keys.edited), "retained_keys": len(keys.retained)}

    def solve_layer(
        self, module: SPEED, keys: SPEEDKeys, weight: Tensor, number: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Change (d_out, D), float64, of the ``number``-th edited ``weight``, and what to report of it."""
        stored, weight = weight, for_solving(weight)  # the stored type is what the edit is rounded to
        erasing = erasing_update(weight, keys.edited, keys.anchors, keys.num_texts)
        kept = keys.retained
        if module.filter:
            kept = kept[most_influenced(kept, erasing)]
        copies = augmented(kept, weight, module.augment, seeded(module.seed, "augmentation", number))
        if len(copies):  # the copies are filtered in any case, as in the reference code
            copies = copies[most_influenced(copies, erasing)]
        free = retained_null_space(torch.cat([kept, copies]), module.threshold, module.rule, module.minimum)
        settings = module.retain_scale, module.lamb, keys.num_texts
        delta = speed_update(weight, keys.edited, keys.anchors, free, keys.invariants, *settings)
        rounded = for_solving((weight + delta).to(stored)) - weight  # what the stored weight takes up
        report = {
            "kept": len(kept),
            "augmented": len(copies),
            "null_space_dimension": free.dimension,
            "keys_kept": float((keys.edited @ free.basis).norm() / keys.edited.norm()),
            "leak": relative_output(rounded, weight, keys.retained),
            "kept_leak": relative_output(rounded, weight, kept),
            "relative_norm": float(rounded.norm() / weight.norm()),
            "condition_number": speed_condition(keys.edited, free, module.retain_scale, keys.num_texts),
        }
        wished = (keys.anchors - keys.edited) @ weight.mT
        report["remaining_error"] = float((wished - keys.edited @ rounded.mT).norm() / wished.norm())
        if keys.invariants is not None:
            report["invariants_leak"] = relative_output(rounded, weight, keys.invariants)
        return delta, report
