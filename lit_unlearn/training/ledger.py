"""Edits one after another: ``--after CKPT`` edits the concepts of an earlier run again, together with the new ones.

An edit on top of an edit undoes part of it: later targets move what earlier ones have written. So a sequence is solved
anew from the pretrained weights, with the pairs of all concepts so far (``lit_unlearn.data.pairs``); its result is that
of editing them all at once. What a sequence needs to know is therefore a list of concepts, which every checkpoint has.
"""

from __future__ import annotations

from typing import Any

from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import edited_concepts
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.system.errors import UserError, user_errors


def take_earlier(config: Any, kind: type) -> None:
    """Put the concepts of the runs ``config.after`` before those of ``config.concept``, in the order of their edits.

    ``config.after`` is None afterwards, and the model's ``earlier`` has the concepts' names, so that a recipe that is
    stored does not need the earlier files.

    Args:
        config: The configuration of a command.
        kind: Class of the module.

    Raises:
        UserError: The module edits no concepts, an earlier run edits none, is of another model or another concept set,
            or no concept is new.
    """
    if not config.after:
        return
    if not issubclass(kind, ConceptEditor):
        raise UserError(f"after={config.after[0]} has no effect: {kind.__name__} edits no concepts; leave it out.")
    arguments = config.model.init_args
    with user_errors():
        concepts = load_concept_set(arguments.concept_set)
        new = [c.name for c in edited_concepts(arguments.concept, concepts)] if arguments.concept is not None else []
        base = BaseModel.find(arguments.model, arguments.revision, arguments.config_folder)
        earlier: list[str] = []
        for path in config.after:
            edit = read_edit(path)
            edit.check_set(concepts)
            edit.check_base(base)
            if not edit.concepts:
                raise UserError(f"after={path} edits no concept, so there is nothing to edit again: leave it out.")
            earlier += edit.concepts
    earlier = list(dict.fromkeys(earlier))
    if not (added := [name for name in new if name not in earlier]):
        raise UserError(
            f"concept={', '.join(new) or None} adds nothing to what after={', '.join(config.after)} edits already "
            f"({', '.join(earlier)}): name a new concept."
        )
    config.concept = arguments.concept = config.data.init_args.concept = [*earlier, *added]
    arguments.earlier, config.after = earlier, None
