"""Everything that determines pictures besides their prompts and seeds, for the keys of caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import lit_unlearn
from lit_unlearn.diffusion.compiled import is_compiled
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.system.devices import device_name


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: everything that can change a bit of them, except the batch size.

    Attributes:
        weights: Hash of names, types and values of the weights.
        settings: ``Pipeline.settings``: configurations of the parts.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of classifier-free guidance.
        device: Type of device, such as ``cuda``.
        processor: Which one: its name, or the instructions that a CPU has, such as ``AVX512``.
        default_dtype: PyTorch's type of new tensors, which Lightning changes in some of its precisions.
        autocast: Type that autocast computes in where this object is made; None without autocast.
        matmul: Precision of float32 matrix products, such as ``highest``, or ``high`` (TF32).
        compiled: Whether ``torch.compile`` has made the kernels.
        versions: Versions of the libraries that draw.
    """

    weights: str
    settings: Mapping[str, Any]
    num_inference_steps: int
    guidance_scale: float
    device: str
    processor: str
    default_dtype: str
    autocast: str | None
    matmul: str
    compiled: bool
    versions: Mapping[str, str]

    @classmethod
    def of(cls, pipeline: Pipeline, num_inference_steps: int, guidance_scale: float, decoded: bool = True) -> Drawing:
        """How ``pipeline`` draws in the current state of the process.

        Args:
            pipeline: The pipeline, with the weights that it draws with.
            num_inference_steps: Denoising steps.
            guidance_scale: Strength of classifier-free guidance.
            decoded: Whether pictures are drawn; for latents, the autoencoder's weights do not matter.
        """
        parameters = pipeline.named_parameters()
        device = pipeline.device.type
        kernels = torch.backends.cpu.get_cpu_capability() if device == "cpu" else device_name(pipeline.device)
        return cls(
            fingerprint({name: p for name, p in parameters.items() if decoded or not name.startswith("vae.")}),
            pipeline.settings(),
            num_inference_steps,
            guidance_scale,
            device,
            kernels,
            str(torch.get_default_dtype()),
            str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
            torch.get_float32_matmul_precision(),
            is_compiled(pipeline.denoiser),
            library_versions(),
        )

    @property
    def key(self) -> str:
        """SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute pictures, and of this package, which may use them differently."""
    import diffusers
    import transformers

    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "lit_unlearn": lit_unlearn}
    return {name: str(module.__version__) for name, module in modules.items()}
