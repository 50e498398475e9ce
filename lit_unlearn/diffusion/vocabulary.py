"""Which vocabulary a model has, from its files."""

from __future__ import annotations

import torch

from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.single_file.folder import local_folder
from lit_unlearn.diffusion.source import resolve_model
from lit_unlearn.diffusion.stored import stored_weights


def vocabulary_of(model: str, config_folder: str | None = None) -> tuple[str, int | None]:
    """Identify the vocabulary that embeddings learned for ``model`` belong to, without loading the model.

    Args:
        model: A folder, a single file or a hub id.
        config_folder: As for ``BaseModel.find``.

    Returns:
        The fingerprint of the vocabulary's embeddings, and their width. For a hub id: the id, and None.

    Raises:
        ValueError: ``model`` is neither a folder nor shaped like a hub id; or as ``local_folder``.
    """
    path = resolve_model(model, single_file=True)
    if isinstance(path, str):
        return path, None
    weights = stored_weights(local_folder(path, config_folder, model), "text_encoder", torch.float32)
    for name in weights:
        if name.endswith("token_embedding.weight"):
            return fingerprint({"token_embedding.weight": weights[name]}), weights[name].shape[1]
    raise ValueError(f"model={model!r} has no token_embedding.weight in text_encoder/: copy it again.")
