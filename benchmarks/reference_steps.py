"""What a step of the authors' gradient codes costs, and a step of ours; the rows of ``references.py`` for them.

Theirs are restatements, as there. Ours are steps of real fits of the recipes, with Lightning and all that it does
around a step; their first step, which sets up the optimizer, is left out on both sides. All run on the embedded model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import lightning as L
import torch
from costs import Cost, Row, compared, counted
from quiet import QUIET, output_to
from torch import Tensor, nn

from lit_unlearn.diffusion.attention import record_attention
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.system.pixels import save_png, to_pil

PIXELS = 48
"""Side of the embedded model's pictures."""


# --- theirs


def esd_2025(pipeline: Pipeline, steps: int, chain: int, stops: Sequence[int]) -> None:
    """rohitgandikota/erasing at 25613d2: a chain of its own for each step, then three single predictions."""
    null, prompt = (pipeline.encode([text]) for text in ("", "a dog"))
    for number in range(steps):
        with torch.no_grad():
            noise = pipeline.initial_noise([number])
            *_, state = pipeline.chain([null, prompt], noise, chain, 3.0, stop=stops[number])
            x_t, t = state.model_input, state.timestep
            apart = pipeline.predict(x_t, t, prompt) - pipeline.predict(x_t, t, null)
        loss = (pipeline.predict(x_t, t, prompt) + 2 * apart.detach()).square().mean()
        loss.backward()


def our_esd(pipeline: Pipeline, steps: int, chain: int) -> None:
    """Every state of a chain, with the two predictions that guidance has made there (``states_per_chain: all``)."""
    null, prompt = (pipeline.encode([text]) for text in ("", "a dog"))
    made = 0
    while made < steps:
        with torch.no_grad():
            states = list(pipeline.chain([null, prompt], pipeline.initial_noise([made]), chain, 3.0))
        for state in states[: steps - made]:
            apart = state.noise_preds[1] - state.noise_preds[0]
            loss = (pipeline.predict(state.model_input, state.timestep, prompt) + 2 * apart).square().mean()
            loss.backward()
        made += len(states)


class Stepper:
    """What the three training scripts share: weights to train, AdamW, and a limit on the gradient's norm."""

    def __init__(self, pipeline: Pipeline, weights: str = "") -> None:
        self.pipeline = pipeline
        self.noise = torch.Generator().manual_seed(0)
        pipeline.denoiser.requires_grad_(False)
        named = [
            (name, weight) for name, weight in pipeline.denoiser.named_parameters() if not weights or weights in name
        ]
        self.weights = [weight.requires_grad_(True) for _, weight in named]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-6)

    def encoded(self, pictures: Tensor) -> Tensor:
        """Latents of pictures (B, 3, H, W), which these scripts encode anew in each step."""
        with torch.no_grad():
            return self.pipeline.encode_pictures(pictures)

    def texts(self, prompts: list[str]) -> Tensor:
        """States (B, L, D) of prompts, which they encode anew as well."""
        with torch.no_grad():
            return self.pipeline.encode(prompts).states

    def noised(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, the noise in it, and t."""
        noise = torch.randn(latents.shape, generator=self.noise)
        timesteps = torch.randint(1000, (len(latents),), generator=self.noise)
        return self.pipeline.noise.add(latents, noise, timesteps), noise, timesteps

    def predict(self, x_t: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """The UNet's output."""
        return self.pipeline.denoiser(x_t, timesteps, states).sample

    def update(self) -> None:
        """Limit the gradient, step, and forget the gradient."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def concept_ablation(pipeline: Pipeline, steps: int, batch: int) -> Iterable[None]:
    """nupurkmr9/concept-ablation at c11fb1b, ``diffusers/train.py``, model-based with the regulariser.

    Pictures of the anchor twice, once with the concept's prompts and once for the regulariser: 2 B with a gradient, and
    B of the anchor's prompts without.
    """
    script = Stepper(pipeline, "attn2.to_")
    for _ in range(steps):
        latents = script.encoded(torch.rand(2 * batch, 3, PIXELS, PIXELS, generator=script.noise))
        x_t, noise, timesteps = script.noised(latents)
        states, anchors = script.texts(["a dog"] * batch + ["a cat"] * batch), script.texts(["a cat"] * batch)
        live, prior = script.predict(x_t, timesteps, states).chunk(2)
        with torch.no_grad():
            target = script.predict(x_t[:batch], timesteps[:batch], anchors)
        loss = (live - target).square().sum((1, 2, 3)).mean() + (prior - noise[batch:]).square().mean()
        loss.backward()
        script.update()
        yield


def forget_me_not(pipeline: Pipeline, steps: int) -> Iterable[None]:
    """SHI-Labs/Forget-Me-Not at a4a81e8, ``src/train_attn.py``: one picture, one prompt, the whole of the UNet."""
    script = Stepper(pipeline)
    for _ in range(steps):
        latents = script.encoded(torch.rand(1, 3, PIXELS, PIXELS, generator=script.noise))
        x_t, _, timesteps = script.noised(latents)
        states = script.texts(["a photo of a dog"])
        with record_attention(pipeline.denoiser) as attention:
            script.predict(x_t, timesteps, states)
        torch.cat([layer[..., 4:6].flatten() for layer in attention.values()]).norm().backward()
        script.update()
        yield


def siss(pipeline: Pipeline, steps: int, batch: int) -> Iterable[None]:
    """claserken/SISS at af2a29c, ``delete_sd.py``: one forward, two backwards through it, gradients kept by copies."""
    script = Stepper(pipeline)
    for _ in range(steps):
        keep, forget = (script.encoded(torch.rand(batch, 3, PIXELS, PIXELS, generator=script.noise)) for _ in range(2))
        chosen = (torch.rand(batch, generator=script.noise) > 0.5).view(-1, 1, 1, 1)
        x_t, noise, timesteps = script.noised(torch.where(chosen, keep, forget))
        output = script.predict(x_t, timesteps, script.texts(["a dog"] * batch))
        (output - noise).square().sum().div(batch).backward(retain_graph=True)
        first = [weight.grad.clone() for weight in script.weights]
        (output - noise + 0.1).square().sum().div(batch).backward()
        second = [weight.grad.clone() - kept for weight, kept in zip(script.weights, first, strict=True)]
        first = [weight.grad.clone() - kept for weight, kept in zip(script.weights, second, strict=True)]
        norms = [torch.sqrt(sum(part.norm() ** 2 for part in parts)) for parts in (first, second)]
        for weight, one, other in zip(script.weights, first, second, strict=True):
            weight.grad = one - 0.1 * norms[0] / norms[1] * other
        script.update()
        yield


def measured(script: Iterable[None], pipeline: Pipeline, steps: int) -> Cost:
    """Cost of a script's steps but the first."""
    running = iter(script)
    next(running)
    with counted(pipeline.texts[0].model, pipeline.denoiser, pipeline.vae) as cost:
        for _ in range(steps - 1):
            next(running)
    return cost


# --- ours


class Clock(L.Callback):
    """Costs of the batches of a fit but the first, in ``Clock.cost``."""

    cost = Cost()

    def __init__(self) -> None:
        self.block = ExitStack()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.is_last_batch:
            self.block.close()
        elif trainer.global_step == 1:
            pipeline = module.pipeline
            parts = pipeline.texts[0].model, pipeline.denoiser, pipeline.vae
            Clock.cost = self.block.enter_context(counted(*parts))


def fitted(recipe: str, steps: int, options: Iterable[str]) -> Cost:
    """Cost of the steps of a fit but the first."""
    from lit_unlearn.training.cli import run
    from lit_unlearn.training.recipes import resolve_recipes

    with tempfile.TemporaryDirectory() as folder:
        args = ["--trainer.default_root_dir", folder, "--trainer.callbacks", "reference_steps.Clock", *QUIET]
        args += ["--trainer.max_epochs", "1", "--data.steps", str(steps), *options]
        with output_to(Path(folder, "log")):
            run(resolve_recipes(["fit", "--config", recipe, *args]))
    return Clock.cost


def folders(root: Path) -> list[str]:
    """Options that name folders of pictures to keep and to forget, with one caption."""
    options, generator = ["--data.caption", "a dog"], torch.Generator().manual_seed(0)
    for name, count in (("keep", 16), ("forget", 4)):
        (root / name).mkdir()
        for number in range(count):
            save_png(root / name / f"{number}.png", to_pil(torch.rand(3, PIXELS, PIXELS, generator=generator)))
        options += [f"--data.{name}", str(root / name)]
    return [*options, "--data.held_out", "null"]


# --- rows


def esd_row(steps: int, chain: int, repeats: int, model: str = "emoji-sd") -> Row:
    """ESD's code of 2025 against kept states, by default on the embedded model."""
    from lit_unlearn.diffusion.load import load_pipeline

    pipeline = load_pipeline(model)
    pipeline.denoiser.requires_grad_(True)
    # A stop of its own for each step, as evenly spread as a uniform draw is on average.
    stops = [(2 * number + 1) * chain // (2 * steps) for number in range(steps)]
    theirs, ours = compared(
        lambda: esd_2025(pipeline, steps, chain, stops),
        lambda: our_esd(pipeline, steps, chain),
        repeats,
        denoiser=pipeline.denoiser,
    )
    note = f"{steps} forwards of each carry a gradient; the literal sampling needs its chains, whoever runs it"
    return Row(f"ESD, {steps} steps, chains of {chain}", "ESD 25613d2", theirs, ours, note)


def step_rows(steps: int, repeats: int, model: str = "emoji-sd") -> list[Row]:
    """A row for each of the three scripts, the best of ``repeats``; costs of ``steps - 1`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = folders(Path(folder))
        of_model = ["--model.model", model]
        cases: list[tuple[str, str, Callable[[Pipeline], Iterable[None]], str, list[str]]] = [
            (
                "Concept Ablation, 8 pictures, with the regulariser",
                "Concept Ablation c11fb1b",
                lambda pipeline: concept_ablation(pipeline, steps, 8),
                "concept_ablation_diffusers.yaml",
                ["--concept", "dog", "--model.images", "8", "--model.anchor_inference_steps", "2", *of_model],
            ),
            (
                "Forget-Me-Not, 1 picture",
                "Forget-Me-Not a4a81e8",
                lambda pipeline: forget_me_not(pipeline, steps),
                "forget_me_not_paper.yaml",
                ["--concept", "dog", "--model.num_images", "2", *of_model],
            ),
            (
                "SISS, 16 pairs",
                "SISS af2a29c",
                lambda pipeline: siss(pipeline, steps, 16),
                "siss.yaml",
                ["--model.combination", "norm", *pictures, *of_model],
            ),
        ]
        rows = []
        for case, restates, script, recipe, options in cases:
            best = [Cost(), Cost()]
            for _ in range(repeats):
                pipeline = load_pipeline(model)
                for place, cost in enumerate(
                    (measured(script(pipeline), pipeline, steps), fitted(recipe, steps, options))
                ):
                    best[place] = min(best[place], cost, key=lambda one: one.seconds)
            rows.append(Row(f"{case}: {steps - 1} steps", restates, *best))
        return rows
