"""Null-space edits of the tiny UNet; data-unlearning methods on it, and what a step of them sees and does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lit_unlearn.data.images import KeepForgetImages
from lit_unlearn.methods.data_unlearning import DataUnlearning, Pairs
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement, UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement


@pytest.fixture(autouse=True)
def loads_copies(loads_copies: None) -> None:
    """In every test of this folder."""


@pytest.fixture
def keys_and_values(refinement: Callable[..., ValueRefinement]) -> Callable[..., Any]:
    """Makes a null-space edit of K and V of ``tiny_sd``; takes the arguments that shall differ."""
    return partial(refinement, UNetValueRefinement, watched_prompts=2)


@pytest.fixture
def feed_forward(refinement: Callable[..., ValueRefinement]) -> Callable[..., Any]:
    """Makes a null-space edit of the FFN of ``tiny_sd``; takes the arguments that shall differ."""
    return partial(refinement, UNetFeedForwardRefinement, watched_prompts=2, noises_per_prompt=2)


@pytest.fixture
def unlearner(tiny_sd: Path) -> Callable[..., Any]:
    """Makes a method that changes the weights by minus the gradient; takes the class and the arguments that differ."""

    def build(kind: type[DataUnlearning], **arguments: Any) -> DataUnlearning:
        defaults = {
            "model": str(tiny_sd),
            "num_inference_steps": 1,
            "optimizer": partial(torch.optim.SGD, lr=1.0),
            "max_grad_norm": None,
            "judge": None,
        }
        return kind(**{**defaults, **arguments})

    return build


@pytest.fixture
def fit_images(trainer_with: Callable[..., L.Trainer], keep_forget: dict[str, str]) -> Callable[..., L.Trainer]:
    """Fits a method on ``keep_forget``, one step of four pairs by default, and returns the trainer."""

    def run(
        module: DataUnlearning, *callbacks: L.Callback, ckpt_path: Path | None = None, max_epochs: int = 1, **data: Any
    ) -> L.Trainer:
        images = KeepForgetImages(**{**keep_forget, "steps": 1, "batch_size": 4, "images_per_prompt": 2, **data})
        trainer = trainer_with(*callbacks, max_epochs=max_epochs, limit_val_batches=0)
        trainer.fit(module, images, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
        return trainer

    return run


class Step:
    """One step of a method: the pairs that it saw, what it did to the weights, and a copy of the UNet from before."""

    def __init__(self, module: DataUnlearning, fit: Callable[..., L.Trainer], **data: Any) -> None:
        self.module, self.pairs = module, []  # type: tuple[DataUnlearning, list[Pairs]]
        draw = module.pairs

        def record(*args: Any) -> Pairs:
            self.pairs.append(draw(*args))
            return self.pairs[-1]

        module.pairs = record  # type: ignore[method-assign]
        self.trainer = fit(module, **data)
        parameters = module.pipeline.named_parameters()
        values = {name.removeprefix("unet."): value for name, value in module.pretrained.values.items()}
        self.update = torch.cat([(v - parameters[f"unet.{n}"].detach()).flatten() for n, v in values.items()])
        self.unet: nn.Module = copy.deepcopy(module.unet)
        self.unet.load_state_dict(values, strict=False)
        self.names = list(values)

    def levels(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """γ and σ, from the betas, float64."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(0)[pairs.timesteps].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def predict(self, noisy: Tensor, pairs: Pairs, states: Tensor) -> Tensor:
        """The copy's noise prediction, float64."""
        return self.unet(noisy.float(), pairs.timesteps, states).sample.double()

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient of ``loss`` for the copy's edited weights, as one vector."""
        parameters = dict(self.unet.named_parameters())
        found = torch.autograd.grad(loss, [parameters[name] for name in self.names], retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])


@pytest.fixture
def take_step(fit_images: Callable[..., L.Trainer]) -> Callable[..., Step]:
    """Lets a method take one step on a batch in one part."""
    return lambda module, **data: Step(module, fit_images, **data)
