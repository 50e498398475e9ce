"""Which vocabularies a model's text encoders have, from its files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_unlearn.diffusion.check import declared_parts
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.single_file.folder import local_folder
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.diffusion.stored import stored_weights

TABLES = ("token_embedding.weight", "shared.weight")
"""Ends of the names of vocabularies' embeddings, in a CLIP and in a T5."""


def vocabulary_fingerprint(tables: Mapping[str, Tensor]) -> str:
    """Hash of the vocabularies' embeddings (tokens, D) by the names of their text encoders."""
    if len(tables) == 1:
        (table,) = tables.values()
        return fingerprint({"token_embedding.weight": table.float()})
    return fingerprint({f"{part}.table": table.float() for part, table in tables.items()})


def vocabulary_of(model: str, config_folder: str | None = None) -> tuple[str, int | None]:
    """Identify the vocabularies that embeddings learned for ``model`` belong to, without loading the model.

    Args:
        model: A folder, a single file or a hub id.
        config_folder: As for ``BaseModel.find``.

    Returns:
        The fingerprint of the vocabularies' embeddings, and the sum of their widths. For a hub id: the id, and None.

    Raises:
        ValueError: ``model`` is neither a folder nor shaped like a hub id; or as ``local_folder``.
    """
    path = resolve_model(model, single_file=True)
    if isinstance(path, str):
        return path, None
    folder = local_folder(path, config_folder, model)
    parts = [part.encoder for part in declared_parts(folder, model).values() if part.encoder]
    tables = {}
    for part in parts:
        weights = stored_weights(folder, part, torch.float32)
        name = next((name for name in weights if name.endswith(TABLES)), None)
        if name is None:
            raise ValueError(f"model={model!r} has no {TABLES[0]} in {part}/: copy it again.")
        tables[part] = weights[name]
    return vocabulary_fingerprint(tables), sum(table.shape[1] for table in tables.values())
