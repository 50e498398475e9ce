"""The direct edit of the maps that read text first, on every family: ``V1 = W K1*``, without descent.

Data flow: at the start of the fit the module encodes edit prompts (K1), target prompts (K1*) and retained prompts (K0),
once for all maps of a way (``text_ways``): the states of all positions, and the pooled vector where a family has one.
At the end of the only epoch the recipe's ``edit`` writes all maps in one solve for each way. No edit moves the inputs
of these maps, so that it reaches its targets as far as the null space allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_unlearn.core.alignment import from_first_difference
from lit_unlearn.core.solvers import Write
from lit_unlearn.core.subject_tokens import SubjectTokens
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor, pairs_of
from lit_unlearn.methods.shared.text_maps import (
    TextKeys,
    by_way,
    retained_inputs,
    select_first_maps,
    subject_places,
    text_keys,
)
from lit_unlearn.system.devices import for_solving


@dataclass(frozen=True)
class Pairs:
    """The edited inputs on one way.

    Attributes:
        keys: K1, (m, d_in), float64.
        goals: K1*, the inputs of the target prompts at the aligned positions, (m, d_in), float64.
        carrying: Which of the keys may carry the concept, (m,) bool.
    """

    keys: Tensor
    goals: Tensor
    carrying: Tensor


class ContextEdit(ClosedFormMethod, ConceptEditor):
    """Gives edit prompts the outputs of their target prompts, in the linear maps that read text first.

    Args:
        tokens: States of an edit prompt that are edited: ``all`` positions, each with the target prompt's that is
            aligned with it; ``last_subject``, its last token; ``from_subject``, all from that token on.
        retain: Further prompts to retain, besides the edit prompts of the set's other concepts.
        retain_empty: Also retain the empty prompt, with the weight of all retained prompts together, since
            classifier-free guidance uses it with each of them.
        edited_parameters: Group or pattern of the first linear maps on text: ``context``, all of them; ``xattn-kv``;
            or a part, such as ``context_embedder``.
        **kwargs: See ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        tokens: SubjectTokens = "all",
        retain: list[str] | None = None,
        retain_empty: bool = True,
        edited_parameters: str = "context",
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        self.tokens, self.retain_empty = tokens, retain_empty
        own = [pairs_of(concept) for concept in self.repaired]
        self.targets_of_edited = list(zip(self.repaired, own, strict=True))
        self.pairs = [pair for pairs in own for pair in pairs]
        self.retain_prompts = self.prompts_to_retain(retain)

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of the first linear maps on text that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        return select_first_maps(self, names)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Encode edit, target and retained prompts, once."""
        super().on_fit_start()
        ways = by_way(self.edited_names)
        edited, targets = text_keys(self.pipeline, *zip(*self.pairs, strict=True), ways=list(ways), which=self.tokens)
        self.on_way = {way: self._pairs(edited[way], targets[way]) for way in ways}
        empty_weight = len(self.retain_prompts) if self.retain_empty else 0
        kept = retained_inputs(self.pipeline, list(ways), self.retain_prompts, empty_weight)
        self.retained = {name: kept[way] for way, names in ways.items() for name in names}

    def _pairs(self, edited: TextKeys, targets: TextKeys) -> Pairs:
        rows, places, (goal_places,) = subject_places(self.pipeline, edited, [targets], self.tokens)
        carrying = self._carrying(edited, targets)[rows, places]
        return Pairs(for_solving(edited.at(rows, places)), for_solving(targets.at(rows, goal_places)), carrying)

    def _carrying(self, edited: TextKeys, targets: TextKeys) -> Tensor:
        """Positions (n, L), bool, whose states can have seen the concept: all, if an encoder reads both directions."""
        if not edited.ids:
            return torch.ones(len(edited), 1, dtype=torch.bool)
        masks = []
        for number, mine, theirs in zip(self.pipeline.token_order, edited.ids, targets.ids, strict=True):
            causal = self.pipeline.texts[number].causal
            masks.append(from_first_difference(mine, theirs) if causal else torch.ones_like(mine, dtype=torch.bool))
        return torch.cat(masks, dim=1)

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """All maps of a way at once."""
        for way, names in by_way(self.edited_names).items():
            pairs, group = self.on_way[way], []
            for name in names:
                layer = self.layers[name]
                weight, kept = for_solving(layer.weight.detach()), self.retained[name]
                dtype, goals = layer.weight.dtype, pairs.goals
                group.append(
                    Write(name, weight, dtype, pairs.keys, None, kept, anchors=goals, concept_keys=pairs.carrying)
                )
            yield group

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Report the number of edited states on each way, and how much the weights have changed."""
        self.report["edited_states"] = {way: len(pairs.keys) for way, pairs in self.on_way.items()}
        super().after_writes(epoch, is_last)
