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
from lit_unlearn.core.subject_tokens import SubjectTokens
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor, check_retained
from lit_unlearn.methods.shared.text_maps import TextKeys, by_way, select_first_maps, subject_places, text_keys
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
        edited_parameters: Group or pattern of the linear maps that read text first; the paper edits ``attn2.to_v``.
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
        labels = self.own_labels
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
        """Weights of the first linear maps on text that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        return select_first_maps(self, names)

    def on_fit_start(self) -> None:
        """Gather the inputs of the edited layers; all layers of a way have the same inputs."""
        super().on_fit_start()
        ways = by_way(self.edited_names)
        texts = self.edited_texts, self.anchor_texts, self.retained_texts
        edited, anchors, retained = text_keys(self.pipeline, *texts, ways=list(ways), which=self.tokens)
        # Of the empty prompt all positions are needed, which the others may leave out.
        empty = {} if self.invariants is None else text_keys(self.pipeline.unskipped, [""], ways=list(ways))[0]
        self.keys: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}
        self.retained = {}
        for way, names in ways.items():
            rows, places, (anchor_places,) = subject_places(self.pipeline, edited[way], [anchors[way]], self.tokens)
            kept_places = subject_places(self.pipeline, retained[way], [], self.tokens)[:2]
            self.keys[way] = for_solving(edited[way].at(rows, places))
            self.anchors[way] = for_solving(anchors[way].at(rows, anchor_places))
            kept = for_solving(retained[way].at(*kept_places))
            moment, prompts = second_moment(kept).cpu(), len(self.retained_texts)
            own = Retained(moment, len(kept), kept, self.invariant_keys(empty.get(way)), prompts, largest_norm(kept))
            self.retained |= dict.fromkeys(names, own)

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """All layers of a way at once."""
        number = 0
        for way, names in by_way(self.edited_names).items():
            group = []
            for name in names:
                weight = for_solving(self.layers[name].weight.detach())
                group.append(
                    Write(
                        name,
                        weight,
                        self.layers[name].weight.dtype,
                        self.keys[way],
                        None,
                        self.retained[name],
                        anchors=self.anchors[way],
                        texts=len(self.edited_texts),
                        seed=(self.seed, "augmentation", number),
                    )
                )
                number += 1
            yield group

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Report the number of keys, and how much the weights have changed."""
        retained = {way: self.retained[names[0]] for way, names in by_way(self.edited_names).items()}
        self.report |= {
            "edited_keys": sum(map(len, self.keys.values())),
            "retained_keys": sum(kept.count for kept in retained.values()),
        }
        super().after_writes(epoch, is_last)

    def invariant_keys(self, empty: TextKeys | None) -> Tensor | None:
        """The invariants K2 of the ``empty`` prompt, as rows (k, d_in), float64, or None."""
        if self.invariants is None or empty is None:
            return None
        states = for_solving(empty.read())
        start, padding = states[:1], states[1:]
        if self.invariants == 0 or not len(padding):
            return start
        return torch.cat([start, k_means(padding, self.invariants, seeded(self.seed, "centres"))])
