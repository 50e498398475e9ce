"""The families of pipelines, by the ``_class_name`` in ``model_index.json``.

A new family needs a class in a file here, its place in ``FAMILIES``, and a test file.
"""

from __future__ import annotations

from collections.abc import Mapping

from lit_unlearn.diffusion.families.flux import Flux
from lit_unlearn.diffusion.families.pixart import PixArtAlpha, PixArtSigma
from lit_unlearn.diffusion.families.stable_diffusion import StableDiffusion
from lit_unlearn.diffusion.families.stable_diffusion_3 import StableDiffusion3
from lit_unlearn.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from lit_unlearn.diffusion.pipeline import Pipeline

FAMILIES: Mapping[str, type[Pipeline]] = {
    family.index_class: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArtAlpha, PixArtSigma)
}
"""Every family by the class of its pipelines in diffusers."""

__all__ = ["FAMILIES", "Flux", "PixArtAlpha", "PixArtSigma", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL"]
