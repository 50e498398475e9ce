from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from helpers import changed, weights
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.methods.one_sided import NaiveDeletion, NegGrad
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.methods.siss import SISS, TwoPass

Build = Callable[..., DataUnlearning]
Fit = Callable[..., L.Trainer]
TakeStep = Callable[..., Any]

ADAM = {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "max_grad_norm": 1.0}


# --- what a step sees


def test_latents_and_states_are_those_of_the_folders(
    unlearner: Build, fit_images: Fit, keep_forget: dict[str, str]
) -> None:
    module = unlearner(NaiveDeletion)
    fit_images(module)
    paths = [path for name in ("keep", "forget") for path in sorted(Path(keep_forget[name]).glob("*.png"))]
    pixels = np.stack([np.array(Image.open(path).resize((16, 16), Image.Resampling.LANCZOS)) for path in paths])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = module.vae.encode(pictures * 2 - 1).latent_dist.mean * module.vae.config.scaling_factor
    assert_close(module.latents, expected, rtol=1e-4, atol=1e-5)
    owl = module.pairs(torch.tensor([[0, 4, 1]]), 0)
    states = encode_prompts(module.pipeline.tokenizer, module.text_encoder, ["an owl", "a cat"])
    # Prompts encoded in another batch round differently.
    assert_close(torch.cat([owl.keep_condition.states, owl.forget_condition.states]), states, rtol=1e-4, atol=1e-4)
    assert torch.equal(owl.keep, module.latents[4:5])
    assert torch.equal(owl.forget, module.latents[6:7])
    assert not owl.same_caption.any()


def test_what_is_drawn_belongs_to_seed_epoch_step_and_place(unlearner: Build, fit_images: Fit) -> None:
    module = unlearner(SISS, min_timestep=300, max_timestep=700)
    fit_images(module)
    batch = torch.tensor([[place, place % 4, place % 2] for place in range(16)])
    state = torch.get_rng_state()
    together = module.pairs(batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for rows in (batch[:1], batch[5:9]):
        part = module.pairs(rows, 3)
        for name in ("noise", "timesteps", "from_forget", "uniform"):
            assert torch.equal(getattr(part, name), getattr(together, name)[rows[:, 0]])
    assert together.timesteps.min() >= 300 and together.timesteps.max() < 700
    assert len(set(together.timesteps.tolist())) > 8
    assert 0 < int(together.from_forget.sum()) < 16
    assert not torch.equal(module.pairs(batch, 4).noise, together.noise)
    module.seed += 1
    assert not torch.equal(module.pairs(batch, 3).noise, together.noise)


@pytest.mark.parametrize("kind", [SISS, TwoPass])
def test_parts_of_a_batch_take_the_step_of_the_whole(unlearner: Build, take_step: TakeStep, kind: type) -> None:
    whole = take_step(unlearner(kind), batch_size=5)
    parts = take_step(unlearner(kind, micro_batch_size=2), batch_size=5)
    assert [len(pairs.noise) for pairs in parts.pairs] == [2, 2, 1]
    # Convolutions of other batch sizes round differently.
    assert_close(parts.update, whole.update, rtol=1e-3, atol=1e-4 * float(whole.update.abs().max()))


def test_two_processes_take_the_step_of_one(unlearner: Build, take_step: TakeStep) -> None:
    """Each process sums over its share; the sum of the sums over the size of the global batch is the whole's mean."""
    step = take_step(unlearner(NaiveDeletion))
    module, (pairs,) = step.module, step.pairs
    module.unet.load_state_dict(step.unet.state_dict())
    parameters = module.pipeline.named_parameters()
    edited = [parameters[name] for name in module.edited_names]
    shares = []
    for rank in (0, 1):
        share = replace(pairs, **{field.name: getattr(pairs, field.name)[rank::2] for field in fields(pairs)})
        (loss,) = module.losses(share)
        shares.append(list(torch.autograd.grad(loss.sum(), edited)))
    flat = [torch.cat([gradient.flatten() for gradient in share]) for share in shares]

    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        assert torch.equal(tensor, flat[0])
        return flat[0] + flat[1]

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(world_size=2, strategy=strategy, datamodule=module.images)  # type: ignore[assignment]
    module.average(shares[0])
    update = torch.cat([gradient.flatten() for gradient in shares[0]])
    assert_close(update, step.update, rtol=1e-3, atol=1e-4 * float(update.abs().max()))


@pytest.mark.parametrize("limit", [1.0, 1e9])
def test_a_long_gradient_is_scaled_down(unlearner: Build, take_step: TakeStep, limit: float) -> None:
    # An update is the difference of two weights: small ones would be mostly their rounding.
    free = take_step(unlearner(NegGrad, superfactor=1e-3))
    limited = take_step(unlearner(NegGrad, superfactor=1e-3, max_grad_norm=limit * float(free.update.norm()) / 2))
    factor = min(1.0, limit / 2)
    assert_close(limited.update, factor * free.update, rtol=1e-2, atol=1e-3 * float(free.update.abs().max()))


# --- what moves


def test_edited_weights_move_and_no_others(unlearner: Build, fit_images: Fit) -> None:
    module = unlearner(SISS, edited_parameters="xattn", **ADAM)
    module.configure_model()
    before = weights(module)
    fit_images(module)
    assert set(changed(before, weights(module))) == set(module.edited_names)
    assert module.report["weight_change_ratio"] > 1e-4


def test_a_schedule_is_followed(unlearner: Build, fit_images: Fit) -> None:
    module = unlearner(
        NaiveDeletion,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    trainer = fit_images(module, steps=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    assert trainer.global_step == 3


def test_half_precision_weights_stay_so(unlearner: Build, fit_images: Fit) -> None:
    module = unlearner(SISS, dtype="bfloat16", **ADAM)
    fit_images(module)
    assert {weights(module)[name].dtype for name in module.edited_names} == {torch.bfloat16}


# --- resume


class SaveEveryStep(L.Callback):
    """Saves ``step=N.ckpt`` after each step, as ``SaveOnSignal`` does after one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumes_in_the_middle_of_an_epoch(unlearner: Build, fit_images: Fit, tmp_path: Path) -> None:
    whole = unlearner(SISS, **ADAM)
    fit_images(whole, SaveEveryStep(tmp_path), steps=3, max_epochs=2)
    for step in (2, 4):
        resumed = unlearner(SISS, **ADAM)
        path = tmp_path / f"step={step}.ckpt"
        trainer = fit_images(resumed, ckpt_path=path, steps=3, max_epochs=2)
        assert trainer.global_step == 6
        assert changed(weights(whole), weights(resumed)) == []
        assert resumed.current_cost()["unet_forwards"] == whole.current_cost()["unet_forwards"] == 6 * 4


def test_a_checkpoint_belongs_to_its_pictures(
    unlearner: Build, fit_images: Fit, keep_forget: dict[str, str], tmp_path: Path
) -> None:
    fit_images(unlearner(SISS, **ADAM), ModelCheckpoint(tmp_path, filename="last"))
    path = tmp_path / "last.ckpt"
    ours = torch.load(path, weights_only=True)[CHECKPOINT_KEY]
    assert ours["concepts"] == []
    assert ours["images"]["forget"]["pictures"] == 2
    with pytest.raises(ValueError, match=r"other pictures than those of data\.keep \(5 there, 2 here\)"):
        fit_images(
            unlearner(SISS, **ADAM),
            ckpt_path=path,
            keep=keep_forget["forget"],
            forget=keep_forget["keep"],
            pairing="any",
        )


# --- wrong values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_timestep": 1000}, r"model\.min_timestep=1000 and max_timestep=1000"),
        ({"max_timestep": 1001}, r"model\.min_timestep=0 and max_timestep=1001"),
        ({"micro_batch_size": 0}, r"model\.micro_batch_size=0 must be at least 1"),
        ({"max_grad_norm": 0.0}, r"model\.max_grad_norm=0\.0 must be positive"),
        ({"copy_quantile": 0.0}, r"model\.copy_quantile=0\.0 must lie between 0 and 1"),
        ({"judge": "llava"}, "model.judge='llava' has no features in which copies could be looked for: take emoji"),
        ({"judge": "clip"}, "judge='clip' needs a concept set, and here is none"),
        ({"judge": "nowhere"}, "judge='nowhere' is no judge and no folder: take clip, emoji"),
        ({"judge": "."}, r"judge='.' has no config\.json"),
        ({"edited_parameters": "text-fc2"}, r"selects text_encoder\..*: this method edits only the unet"),
        ({"edited_parameters": "decoder"}, r"selects vae\..*: this method edits only the unet"),
    ],
)
def test_wrong_values(unlearner: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unlearner(NaiveDeletion, **arguments)


def test_a_loss_scaler_is_refused(unlearner: Build, fit_images: Fit) -> None:
    module = unlearner(NaiveDeletion)
    fit_images(module)
    module.trainer = SimpleNamespace(precision="16-mixed")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"trainer\.precision=16-mixed scales one loss"):
        module.on_fit_start()


def test_prompts_are_no_pictures(unlearner: Build, pets: str, trainer_with: Callable[..., L.Trainer]) -> None:
    with pytest.raises(ValueError, match=r"NaiveDeletion needs the pictures of KeepForgetImages.*ConceptPrompts"):
        trainer_with(max_epochs=1, limit_val_batches=0).fit(unlearner(NaiveDeletion), ConceptPrompts("dog", pets))
