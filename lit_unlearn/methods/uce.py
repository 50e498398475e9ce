"""Unified Concept Editing (Gandikota et al., WACV 2024): maps text states of concepts to the outputs of their guides.

Data flow: at the start of the fit the module encodes phrases, guides and preserved prompts, once for all edited layers.
At the end of the only epoch the recipe's ``edit`` solves for the targets v* of all layers at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_unlearn.core.solvers import Write
from lit_unlearn.core.subject_tokens import SubjectTokens
from lit_unlearn.core.uce import without_component
from lit_unlearn.data.concepts import Concept
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import ConceptEditor, check_retained
from lit_unlearn.methods.shared.text_maps import (
    TextKeys,
    by_way,
    retained_inputs,
    select_first_maps,
    subject_places,
    text_keys,
)
from lit_unlearn.system.devices import for_solving

TEMPLATES = ("a picture of {}", "an image of {}", "a drawing of {}", "this is {}", "look at {}")
STYLE_TEMPLATES = ("a picture in {} style", "an image in the style of {}", "drawn as {}", "{} art", "work in {}")
"""Ways to put a name into words, for ``expand``."""


@dataclass(frozen=True)
class Mapped:
    """The edited states on one way of the text.

    Attributes:
        keys: Their states, (m, d_in), float64.
        guides: States of each list of guides, (m, d_in), float64.
        rows: Number of the phrase that each state belongs to, (m,).
    """

    keys: Tensor
    guides: list[Tensor]
    rows: Tensor


class PhraseMap(ClosedFormMethod, ConceptEditor):
    """Base of erasing and debiasing: the phrases whose states are mapped, and the prompts whose outputs are preserved.

    A subclass sets ``phrases``, the edited phrases, and ``guides``, lists that each hold one guide per phrase.

    Args:
        preserve: Prompts whose outputs should not change; ``others``, the other concepts of the set; or null for none.
        preserve_tokens: States of a preserved prompt that are preserved: ``last_subject``, its last token (UCE's code
            of 2025); or ``all`` positions, and those of the empty prompt, also without a list (UCE's code of 2023).
        tokens: States of a phrase that are edited: ``last_subject``, its last token (code of 2025); ``from_subject``,
            from that token to the end of the window (code of 2023); ``all`` except BOS, aligned with the guide's.
        edited_parameters: Group or pattern of the linear maps that read text first: ``attn2.to_k`` and ``attn2.to_v``
            of a UNet, a context embedder, the embedder of pooled vectors. A pooled vector is a single state.
        **kwargs: See ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    phrases: list[str]
    guides: list[list[str]]

    def __init__(
        self,
        preserve: str | list[str] | None = None,
        preserve_tokens: Literal["last_subject", "all"] = "all",
        tokens: SubjectTokens = "last_subject",
        edited_parameters: str = "xattn-kv",
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        self.tokens, self.preserve_tokens = tokens, preserve_tokens
        self.preserved = self._preserved_prompts(preserve)

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of the first linear maps on text that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        return select_first_maps(self, names)

    @abstractmethod
    def targets(self, outputs: Tensor, guide_outputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """v* (m, d_out) of a layer.

        Args:
            outputs: Its pretrained outputs for the phrases' states, (m, d_out).
            guide_outputs: Its pretrained outputs for the states of each list of guides, (m, d_out).
            rows: Number of the phrase that each state belongs to, (m,).
        """

    def goal_states(self, mapped: Mapped) -> Tensor | None:
        """States (m, d_in) whose outputs are v* in every layer; None if v* is not linear in the layer's weight."""
        return None

    def other_prompts(self) -> list[str]:
        """Prompts for ``preserve: others``: names of the other concepts, except those that name an edited one."""
        return self.concepts.retain_names(self.own_labels)

    def _preserved_prompts(self, preserve: str | list[str] | None) -> list[str]:
        """Check and return the preserved prompts."""
        if preserve is None:
            return []
        if isinstance(preserve, str):
            if preserve != "others":
                raise ValueError(f"model.preserve={preserve!r} is not a list: give others, or prompts such as [a cat].")
            if not (prompts := self.other_prompts()):
                raise ValueError(
                    f"model.preserve='others' finds no prompt besides {', '.join(self.own_labels)} in "
                    f"{self.concepts.name}: edit fewer concepts at once, or set it to null."
                )
            return prompts
        check_retained(preserve, self.edited, "preserve")
        return list(preserve)

    def on_fit_start(self) -> None:
        """Encode phrases, guides and preserved prompts, once."""
        super().on_fit_start()
        ways = by_way(self.edited_names)
        phrases, *guides = text_keys(self.pipeline, self.phrases, *self.guides, ways=list(ways), which=self.tokens)
        self.mapped = {way: self._mapped(phrases[way], [guide[way] for guide in guides]) for way in ways}
        every = self.preserve_tokens == "all"
        # As in the code of 2023, all positions of the empty prompt are preserved, also if nothing else is.
        empty = int(every and "" not in self.preserved)
        kept = retained_inputs(self.pipeline, list(ways), self.preserved, empty, last_subject=not every)
        self.retained = {name: kept[way] for way, names in ways.items() for name in names}

    def _mapped(self, phrases: TextKeys, guides: Sequence[TextKeys]) -> Mapped:
        rows, places, guide_places = subject_places(self.pipeline, phrases, guides, self.tokens)
        keys = for_solving(phrases.at(rows, places))
        found = [for_solving(guide.at(rows, place)) for guide, place in zip(guides, guide_places, strict=True)]
        return Mapped(keys, found, rows.to(keys.device))

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """All layers of a way at once, from their pretrained weights: the rounds of debiasing do not accumulate."""
        for way, names in by_way(self.edited_names).items():
            mapped, group = self.mapped[way], []
            goals = self.goal_states(mapped)
            for name in names:
                layer = self.layers[name]
                weight = for_solving(self.pretrained.values[name].to(layer.weight.device))
                values = self.layer_targets(weight, way) if goals is None else None
                group.append(
                    Write(name, weight, layer.weight.dtype, mapped.keys, values, self.retained[name], anchors=goals)
                )
            yield group

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Report the number of edited states, and how much the weights have changed."""
        self.report["edited_states"] = sum(len(mapped.keys) for mapped in self.mapped.values())
        super().after_writes(epoch, is_last)

    def layer_targets(self, weight: Tensor, way: str) -> Tensor:
        """v* (m, d_out) of the layer whose pretrained weight is ``weight`` (d_out, d_in), float64, on ``way``."""
        mapped = self.mapped[way]
        return self.targets(mapped.keys @ weight.mT, [keys @ weight.mT for keys in mapped.guides], mapped.rows)


class UCE(PhraseMap):
    """Erases or moderates concepts: their phrases get the outputs of a guide.

    Args:
        towards: The guide: the concept's ``target`` or ``anchor`` in the concept set; ``empty``, the empty prompt
            (moderation, and the default of UCE's code for objects); or ``prompt``, the prompt given as ``guide``.
        guide: With ``towards: prompt``, one guide for all edited concepts, or a list with one for each.
        prompts: Phrases to edit: the ``names`` of each concept, as in UCE, or its ``edit_prompts``, which also describe
            it without its name.
        technique: ``replace``, the guide's outputs; or ``tensor``, the guide's outputs minus their component along the
            phrase's own outputs (an option of the code of 2023).
        expand: With ``prompts: names``, also edit each name in a few templates ("a picture of {}"), towards the same
            guide.
        preserve: Prompts whose outputs should not change; ``others``, the names of the set's other concepts, or with
            ``prompts: edit_prompts`` their edit prompts; or null for none.
        **kwargs: See ``PhraseMap`` and ``ConceptEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        towards: Literal["target", "anchor", "empty", "prompt"] = "target",
        guide: str | list[str] | None = None,
        prompts: Literal["names", "edit_prompts"] = "names",
        technique: Literal["replace", "tensor"] = "replace",
        expand: bool = False,
        preserve: str | list[str] | None = "others",
        **kwargs: object,
    ) -> None:
        self.prompts = prompts
        super().__init__(preserve=preserve, **kwargs)  # type: ignore[arg-type]
        self.towards, self.technique, self.expand = towards, technique, expand
        if expand and prompts != "names":
            raise ValueError(f"model.expand=true puts names into templates, but prompts={prompts!r}: choose names.")
        guides = self._given_guides(guide)
        of_concepts = [self._pairs(concept, given) for concept, given in zip(self.repaired, guides, strict=True)]
        self.targets_of_edited = list(zip(self.repaired, of_concepts, strict=True))
        pairs = [pair for own in of_concepts for pair in own]
        self.phrases = [phrase for phrase, _ in pairs]
        self.guides = [[guide for _, guide in pairs]]

    def _given_guides(self, guide: str | list[str] | None) -> list[str]:
        """Check ``guide`` and return the guide of each edited concept."""
        if self.towards != "prompt":
            if guide is not None:
                raise ValueError(f"model.guide={guide!r} needs towards='prompt', not {self.towards!r}: leave one out.")
            return [""] * len(self.edited)
        if guide is None:
            raise ValueError("model.guide=null does not fit towards='prompt': give the prompt to edit towards.")
        guides = [guide] * len(self.edited) if isinstance(guide, str) else list(guide)
        if len(guides) != len(self.edited):
            raise ValueError(
                f"model.guide has {len(guides)} prompts for {len(self.edited)} concepts: give one for all, or one each."
            )
        for concept, text in zip(self.edited, guides, strict=True):
            if name := concept.find_name(text):
                raise ValueError(
                    f"model.guide={text!r} names the edited concept {concept.name!r} ({name!r}): choose another guide."
                )
        return guides

    def _pairs(self, concept: Concept, given: str) -> list[tuple[str, str]]:
        """Phrases of ``concept`` with their guides."""
        if self.prompts == "edit_prompts":
            phrases, targets = list(concept.edit_prompts), list(concept.target_prompts)
        else:
            phrases = expanded(concept.names, concept.kind) if self.expand else list(concept.names)
            targets = [concept.target] * len(phrases)
        if self.towards != "target":
            targets = [{"anchor": concept.anchor, "empty": "", "prompt": given}[self.towards]] * len(phrases)
        return list(zip(phrases, targets, strict=True))

    def other_prompts(self) -> list[str]:
        """Prompts for ``preserve: others``: names, or edit prompts that do not name an edited concept."""
        if self.prompts == "names":
            return super().other_prompts()
        return self.concepts.retain_prompts(self.own_labels)

    def targets(self, outputs: Tensor, guide_outputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """v* (m, d_out): the guide's outputs, with ``tensor`` without their component along ``outputs``."""
        (goal,) = guide_outputs
        return goal if self.technique == "replace" else without_component(goal, outputs, rows)

    def goal_states(self, mapped: Mapped) -> Tensor | None:
        """See ``PhraseMap.goal_states``: with ``replace``, the guide's own states."""
        return mapped.guides[0] if self.technique == "replace" else None


def expanded(names: Sequence[str], kind: str) -> list[str]:
    """Return ``names``, each followed by the templates that contain it."""
    templates = STYLE_TEMPLATES if kind == "style" else TEMPLATES
    return [template.format(name) for name in names for template in ("{}", *templates)]
