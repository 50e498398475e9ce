"""Single files of tiny models, made of diffusers' weights by the map from names to places, the other way round."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_unlearn.edits.single_file import names
from lit_unlearn.edits.single_file.names import Keys, Namer

Maker = Callable[..., Path]


def original(values: Mapping[str, Tensor], prefix: str, namer: Namer, keys: Keys = frozenset()) -> dict[str, Tensor]:
    """The tensors of one part in the layout of the original code.

    Args:
        values: All weights of the part by their names in diffusers.
        prefix: Beginning of the names in the file.
        namer: The map of names.
        keys: Names in the file that say how many blocks there are.
    """
    made: dict[str, Tensor] = {}
    for name, value in values.items():
        spot = namer(name, keys)
        assert spot is not None, name
        key, value = prefix + spot.key, value.detach()
        if spot.transposed:
            value = value.T
        if spot.convolution:
            value = value[..., None, None]
        taken = 0
        for start, stop, of in spot.fractions:
            total = value.shape[0] * of // sum(last - first for first, last, _ in spot.fractions)
            whole = made.setdefault(key, torch.full((total, *value.shape[1:]), torch.nan, dtype=value.dtype))
            size = (stop - start) * total // of
            whole[start * total // of : stop * total // of] = value[taken : taken + size]
            taken += size
        if not spot.fractions:
            assert key not in made
            made[key] = value.clone()
    assert not any(value.isnan().any() for value in made.values())
    return made


@pytest.fixture(scope="session")
def single_file() -> Maker:
    """Writes the pipeline in a folder like ``tiny_sd`` as a single file; returns the file."""

    def build(
        folder: Path,
        path: Path,
        dtype: torch.dtype = torch.float32,
        prefix: str = "model.diffusion_model.",
        encoder: tuple[str, Namer] | None = ("cond_stage_model.transformer.", names.clip),
        metadata: dict[str, str] | None = None,
        **more: Tensor,
    ) -> Path:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        made = original(
            pipeline.unet.state_dict(), prefix, names.unet, frozenset(["input_blocks.2.0.op.weight"])
        ) | original(
            pipeline.vae.state_dict(), "first_stage_model.", names.autoencoder, frozenset(["decoder.up.1.block"])
        )
        if encoder is not None:
            made |= original(pipeline.text_encoder.state_dict(), *encoder)
        made = {key: value.to(dtype).contiguous() for key, value in made.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**made, **more}, path, metadata={"format": "pt"} if metadata is None else metadata)
        return path

    return build


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    """The header of a file of safetensors, and all bytes behind it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]
