"""Solves Unified Concept Editing for all edited layers at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.cross_attention import CrossAttentionEdit
from lit_unlearn.callbacks.numbers import solving
from lit_unlearn.core.uce import map_condition, map_report, map_updates
from lit_unlearn.methods.uce import PhraseMap
from lit_unlearn.system.devices import for_solving


class UCEEdit(CrossAttentionEdit):
    """Maps the phrases of ``UCE`` or ``UCEDebias`` to their targets; all settings are the module's.

    It solves from the pretrained weights, so that the rounds of ``UCEDebias`` do not pile up.
    """

    module_class = PhraseMap
    remedy = "raise model.lamb"

    @override
    def solve(self, module: PhraseMap) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        weights = {
            name: module.pretrained.values[name].to(layer.weight.device) for name, layer in module.layers.items()
        }
        started = time.perf_counter()
        targets = [module.layer_targets(for_solving(weight)) for weight in weights.values()]
        settings = module.preserved_moment, module.erase_scale, module.preserve_scale, module.lamb
        with solving("The cross-attention", "The ridge is model.lamb / model.erase_scale."):
            updates = map_updates(list(weights.values()), module.keys, targets, *settings)
        seconds = time.perf_counter() - started
        condition = map_condition(module.keys, *settings)  # of the one system that all of them share
        deltas, layers = {}, {}
        for (name, weight), update, wished in zip(weights.items(), updates, targets, strict=True):
            before = for_solving(weight)
            edited = before + update
            deltas[name] = edited - for_solving(module.layers[name].weight)
            stored = for_solving(edited.to(weight)) - before  # what the stored weight takes up
            layers[name] = map_report(weight, stored, module.keys, wished, module.preserved_moment)
            layers[name]["condition_number"] = condition
        worst = {key: max(layer[key] for layer in layers.values()) for key in next(iter(layers.values()))}
        module.log_dict({f"edit/{key}": value for key, value in worst.items()}, rank_zero_only=True)
        return deltas, {"layers": layers, "edited_states": len(module.keys), "solve_seconds": seconds}
