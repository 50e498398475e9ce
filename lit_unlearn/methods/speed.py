"""SPEED (Li et al., ICLR 2026): gathers the keys for its closed form on the UNet's cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.core.speed import k_means
from lit_unlearn.core.subject_tokens import SubjectTokens, subject_positions
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor, check_retained
from lit_unlearn.methods.shared.cross_attention import select_keys_and_values, text_states
from lit_unlearn.system.devices import for_solving


class SPEED(ClosedFormMethod, ConceptEditor):
    """Gives the concept's texts the values of their anchors, in the null space of the other concepts' texts.

    Args:
        invariants: Number of centres of the empty prompt's padding whose outputs are kept, together with the
            start-of-text state (IEC); 0 keeps only the start-of-text state, null keeps neither.
        prompts: Texts to edit and to retain: ``names`` of the concepts, as in the paper, or their ``edit_prompts``.
        tokens: Which states of a text are used: the state of its ``last_subject`` token, as in the paper;
            ``from_subject``, all from that token to the end of the window; ``all`` except the start-of-text token's
            (the code's choice for nudity).
        towards: Text whose values the concept gets: its ``target``, its ``anchor``, or the ``empty`` prompt.
        retain: Texts to retain besides those of the set's other concepts.
        seed: Seed of the augmentation's noise and of the random start of the centres.
        edited_parameters: Group or pattern of weights of ``attn2.to_k`` and ``attn2.to_v``; the paper edits ``to_v``.
        **kwargs: See ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        invariants: int | None = 3,
        prompts: Literal["names", "edit_prompts"] = "names",
        tokens: SubjectTokens = "last_subject",
        towards: Literal["target", "anchor", "empty"] = "target",
        retain: list[str] | None = None,
        seed: int = 0,
        edited_parameters: str = "xattn-v",
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        if invariants is not None and invariants < 0:
            raise ValueError(f"model.invariants={invariants} must be zero or larger.")
        self.invariants, self.seed = invariants, seed
        self.tokens = tokens
        self.edited_texts, self.anchor_texts = self._pairs(prompts, towards)
        self.retained_texts = self._retained(prompts, retain or [])

    def _pairs(self, prompts: str, towards: str) -> tuple[list[str], list[str]]:
        """Texts of the edited concepts, and for each of them the text whose values it gets."""
        edited: list[str] = []
        anchors: list[str] = []
        pairs = []
        for concept in self.repaired:
            texts = concept.names if prompts == "names" else concept.edit_prompts
            if towards == "target":
                into = [concept.target] * len(texts) if prompts == "names" else list(concept.target_prompts)
            else:
                into = [concept.anchor if towards == "anchor" else ""] * len(texts)
            edited += texts
            anchors += into
            pairs.append((concept, list(zip(texts, into, strict=True))))
        self.targets_of_edited = pairs
        return edited, anchors

    def _retained(self, prompts: str, extra: Sequence[str]) -> list[str]:
        """Texts of the other concepts that do not name an edited one, and ``extra``, each once.

        Raises:
            ValueError: ``extra`` names an edited concept, or nothing is left.
        """
        labels = self.edited_labels
        check_retained(extra, self.edited)
        if prompts == "edit_prompts":
            texts = self.concepts.retain_prompts(labels)
        else:
            texts = self.concepts.retain_names(labels)
        texts = list(dict.fromkeys([*texts, *extra]))
        if not texts:
            raise ValueError(
                f"concept={', '.join(labels)} leaves no text of {self.concepts.name} to retain: edit fewer concepts at "
                "once, or name what to keep in model.retain."
            )
        return texts

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of ``attn2.to_k`` and ``attn2.to_v`` that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        return select_keys_and_values(self, names)

    def on_fit_start(self) -> None:
        """Gather the inputs of the edited layers; all layers have the same inputs."""
        super().on_fit_start()
        eos_token_id = self.pipeline.text.eos
        ids, states = text_states(self.pipeline, self.edited_texts)
        anchor_ids, anchor_states = text_states(self.pipeline, self.anchor_texts)
        rows, places, (anchor_places,) = subject_positions(ids, [anchor_ids], eos_token_id, self.tokens)
        retained_ids, retained_states = text_states(self.pipeline, self.retained_texts)
        retained_rows, retained_places, _ = subject_positions(retained_ids, [], eos_token_id, self.tokens)
        self.keys = for_solving(states[rows, places])
        self.anchors = for_solving(anchor_states[rows, anchor_places])
        kept = for_solving(retained_states[retained_rows, retained_places])
        moment, prompts = second_moment(kept).cpu(), len(self.retained_texts)
        own = Retained(moment, len(kept), kept, self.invariant_keys(), prompts, largest_norm(kept))
        self.retained = dict.fromkeys(self.edited_names, own)

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """All layers at once."""
        group = []
        for number, (name, layer) in enumerate(self.layers.items()):
            weight = for_solving(layer.weight.detach())
            group.append(
                Write(
                    name,
                    weight,
                    layer.weight.dtype,
                    self.keys,
                    self.anchors @ weight.mT,
                    self.retained[name],
                    anchors=self.anchors,
                    texts=len(self.edited_texts),
                    seed=(self.seed, "augmentation", number),
                )
            )
        yield group

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Report the number of keys, and how much the weights have changed."""
        self.report |= {"edited_keys": len(self.keys), "retained_keys": next(iter(self.retained.values())).count}
        super().after_writes(epoch, is_last)

    def invariant_keys(self) -> Tensor | None:
        """The invariants K2, as rows (k, D), float64, or None."""
        if self.invariants is None:
            return None
        _, states = text_states(self.pipeline, [""])
        start, padding = for_solving(states[0, :1]), for_solving(states[0, 1:])
        if self.invariants == 0:
            return start
        return torch.cat([start, k_means(padding, self.invariants, seeded(self.seed, "centres"))])
