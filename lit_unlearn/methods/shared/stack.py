"""Edits that a fit starts from: the model that it edits is not the base model, but one that was edited before.

Data flow: ``training.ledger`` reads the files of ``--base_edit`` and gives the module a ``Stack``. ``configure_model``
writes it into the base model, so ``module.pretrained`` is the model as the earlier edits left it, which is what the
method reads, keeps and changes, and ``module.unedited`` is the base model. A checkpoint holds the weights of all the
edits, so whoever reads it needs no other file, and it belongs to the base model as that of a single edit does.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.parameters import PretrainedValues, fingerprint

if TYPE_CHECKING:
    from lit_unlearn.methods.shared.editor import DiffusionEditor

CHECKPOINT_KEY = "lit_unlearn"
"""Key in a Lightning checkpoint under which lit-unlearn stores provenance, cost and reports of an edit."""


@dataclass(frozen=True)
class Stack:
    """Earlier edits of a base model.

    Attributes:
        weights: The weights that they have left, by full parameter name.
        links: What each of them was, the first one first, as ``lit_unlearn.edits.chain.Link`` stores it.
        overwritten: Values that a later one of them has replaced, by ``NUMBER/NAME``: what the weight ``NAME`` was
            before the edit ``NUMBER``, counted from 0.
    """

    weights: Mapping[str, Tensor]
    links: Sequence[Mapping[str, Any]]
    overwritten: Mapping[str, Tensor] = field(default_factory=dict)


def hashes_of(links: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What tells edits from each other: the weights that each has left, by their hash, and its concepts."""
    return [(link["sha256"], *link["concepts"]) for link in links]


class EarlierEdits:
    """The edits that a module's fit starts from, or that the checkpoint holds which it evaluates.

    Args:
        module: The module.
    """

    stack: Stack | None = None
    """What a fit starts from, set before ``configure_model``; None for the base model."""
    base_values: PretrainedValues | None = None
    """The base model's values of all weights in a checkpoint; None if the fit's own are all."""

    def __init__(self, module: DiffusionEditor) -> None:
        self.module = module
        self._chain: dict[str, Any] | None = None

    @torch.no_grad()
    def write(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write the stack into a loaded base model's ``parameters``, and keep what they were."""
        if self.stack is None:
            return
        self._keep({*self.module.edited_names, *self.stack.weights}, parameters)
        for name, value in self.stack.weights.items():
            parameters[name].copy_(value)

    def stored(self) -> dict[str, Any] | None:
        """What a checkpoint stores about this edit and the earlier ones; None if there are none."""
        if self.stack is None:
            return self._chain
        own, number, values = self.module.edited_names, len(self.stack.links), self.module.pretrained.values
        replaced = {f"{number}/{name}": values[name] for name in own if name in self.stack.weights}
        return {
            "links": [dict(link) for link in self.stack.links],
            "names": list(own),
            "concepts": list(self.module.new_labels),
            "again": list(self.module.again_labels),
            "overwritten": {**self.stack.overwritten, **replaced},
        }

    def take(self, chain: dict[str, Any] | None, names: Sequence[str]) -> None:
        """Know the earlier edits of a checkpoint that is loaded.

        Args:
            chain: What it stores about them.
            names: Its weights.

        Raises:
            ValueError: A fit goes on that starts from other edits.
        """
        if self.stack is not None:
            if chain is None or hashes_of(chain["links"]) != hashes_of(self.stack.links):
                raise ValueError("The checkpoint was made on top of other edits than base_edit: give those of its fit.")
        elif chain is not None and chain["names"] == self.module.edited_names:
            self._chain = chain
            self._keep(set(names), self.module.pipeline.named_parameters())
            self.module.base_fingerprint = fingerprint(self.module.unedited.values)

    def _keep(self, names: set[str], parameters: Mapping[str, nn.Parameter]) -> None:
        self.base_values = PretrainedValues({name: value for name, value in parameters.items() if name in names})


def check_concepts(file: str, method: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a checkpoint whose concepts differ from the wanted ones.

    Args:
        file: The checkpoint, as the beginning of the message.
        method: Name of the class that made it.
        found: Names of the concepts that it edits; empty if it unlearned pictures.
        wanted: Names of the wanted concepts; empty if the recipe unlearns pictures.

    Raises:
        ValueError: They differ.
    """
    if list(found) == list(wanted):
        return
    names, asked = ", ".join(found), ", ".join(wanted)
    if not found:
        raise ValueError(f"{file} edits no concept ({method}), but concept is {asked}: give the recipe of its own fit.")
    if not wanted:
        raise ValueError(f"{file} edits {names}, but the recipe edits no concept: give the recipe of its own fit.")
    option = shlex.quote(json.dumps(list(found), ensure_ascii=False) if len(found) > 1 else found[0])
    raise ValueError(f"{file} edits {names}, but concept is {asked}: pass --concept {option}.")
