"""The edit that attacks itself: its keys and values, its attack, and the edit in the empty prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from helpers import KV, PROMPTS, TARGETS, Interrupted, by_null_space, changed, interrupt, started, states, weights
from lit_unlearn.diffusion.sampling import add_noise
from lit_unlearn.methods.robust_erasure import RobustErasure

Build = Callable[..., RobustErasure]
Fit = Callable[..., L.Trainer]
KEPT = ["a cat", "the cat in the rain"]
ALIGNED = [0, 1, 3, *range(4, 32), 31]
"""Target position of each position: "dog" takes "ball", the last token of its target, and all behind it shifts."""


@pytest.fixture
def robust(tiny_sd: Path, pets: str, tmp_path: Path) -> Build:
    """Makes a ``RobustErasure`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> RobustErasure:
        defaults = {
            "concept": "dog",
            "model": str(tiny_sd),
            "concept_set": pets,
            "rounds": 1,
            "num_images": 3,
            "num_inference_steps": 1,
            "image_cache": str(tmp_path / "references"),
            "optimizer": partial(torch.optim.Adam, lr=0.1),
        }
        return RobustErasure(**{**defaults, **arguments})

    return build


def soft() -> L.Callback:
    return by_null_space(rule="soft", threshold=0.5, ridge=None, forget_unused=True)


def pretrained_states(module: RobustErasure, *prompts: str) -> Tensor:
    return states(module, *prompts).double()


def solved(module: RobustErasure, name: str, keys: Tensor, goals: Tensor, moment: Tensor) -> Tensor:
    """The minimiser of ``||W' K1 − W K1*||² + ||(W' − W) K0||² + c ||W'||²``."""
    weight = module.pretrained.values[name].double()
    c = 0.5 * moment.trace() / len(moment)
    system = moment + keys.mT @ keys + c * torch.eye(len(moment), dtype=torch.float64)
    return weight @ torch.linalg.solve(system, moment + keys.mT @ goals).mT


def kept_moment(module: RobustErasure, empty: bool = True) -> Tensor:
    kept, nothing = pretrained_states(module, *KEPT).flatten(0, 1), pretrained_states(module, "")[0]
    return kept.mT @ kept + (len(KEPT) * nothing.mT @ nothing if empty else 0)


def test_without_an_attack_it_is_one_soft_edit(robust: Build, fit: Fit) -> None:
    module = robust(rounds=0)
    fit(module, soft())
    keys = pretrained_states(module, *PROMPTS).flatten(0, 1)
    goals = pretrained_states(module, *TARGETS)[:, ALIGNED].flatten(0, 1)
    for name in KV:
        expected = solved(module, name, keys, goals, kept_moment(module))
        assert (expected - module.pretrained.values[name].double()).abs().max() > 0.1
        assert_close(module.layers[name].weight.double(), expected, rtol=0, atol=1e-5)
    assert module.report["edited_states"] == 2 * 32
    assert module.trainer.global_step == 1


def test_what_an_attack_finds_is_edited_too(robust: Build, fit: Fit) -> None:
    module = robust(rounds=2, found_weight=4.0, found_prompts=1)
    fit(module, soft())
    assert module.trainer.current_epoch == 3
    first, second = module.values.detach()[:, 0]
    assert (first - second).norm() > 0.1
    (prompts,) = module.prompts
    assert len(prompts.tokens) == 1
    keys, goals = [pretrained_states(module, *PROMPTS).flatten(0, 1)], [pretrained_states(module, *TARGETS)[:, ALIGNED]]
    goals = [goals[0].flatten(0, 1)]
    for token in (first, second):  # two rounds of "a <token>", which becomes "a soccer ball", with twice the length
        with torch.no_grad(), module.pipeline.texts[0].learned(token[None], prompts.tokens.slots[0]):
            keys.append(2 * module.pipeline.texts[0].states(prompts.tokens.ids[0]).double().flatten(0, 1))
        goals.append(2 * pretrained_states(module, TARGETS[0])[:, ALIGNED].flatten(0, 1))
    for name in KV:
        expected = solved(module, name, torch.cat(keys), torch.cat(goals), kept_moment(module))
        assert_close(module.layers[name].weight.double(), expected, rtol=0, atol=1e-4)
    assert module.report["edited_states"] == 2 * 32 + 2 * 32


def test_a_style_is_edited_in_the_empty_prompt_as_well(robust: Build, fit: Fit) -> None:
    module = robust(concept="sketch", concept_set="emoji20", rounds=0, guidance_edit=0.25)
    module = started(module, fit)
    pairs = list(zip(module.repaired[0].edit_prompts, module.repaired[0].target_prompts, strict=True))
    length, count = 32, len(pairs)
    empty = states(module, "")[0]
    assert_close(module.keys["tokens"][count * length :], count**0.5 * empty)
    pushed = module.target_keys["tokens"][count * length :] / count**0.5
    assert_close(pushed[0], empty[0])  # the first token is the same in every prompt
    edit, goal = (keys["tokens"][: count * length] for keys in (module.keys, module.target_keys))
    ids = module.pipeline.texts[0].tokenize([text for text, _ in pairs])
    ended = (ids == module.pipeline.texts[0].eos).cumsum(-1) > 0
    direction = (edit - goal).unflatten(0, (count, length))[ended].mean(0)
    assert direction.norm() > 0.1
    assert_close(pushed[1:], empty[1:] + 0.25 * direction, rtol=1e-4, atol=1e-5)
    prompts = module.retain_prompts
    kept = pretrained_states(module, *prompts).flatten(0, 1)
    assert_close(module.retained[KV[0]].moment, kept.mT @ kept, rtol=1e-5, atol=1e-3)  # without the empty prompt


def test_objects_leave_the_empty_prompt_as_it_is(robust: Build, fit: Fit) -> None:
    module = started(robust(rounds=0), fit)
    assert len(module.keys["tokens"]) == 2 * 32
    assert_close(module.retained[KV[0]].moment, kept_moment(module), rtol=1e-6, atol=1e-4)


def test_the_attack_lowers_the_error_of_the_edited_model(robust: Build, fit: Fit) -> None:
    module = attacking(robust(), fit)
    assert module.report["weight_change_ratio"] > 0.1
    batch = torch.tensor([0, 1])
    loss = module.training_step(batch, 0)
    loss.backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["values"]
    generators = [module_seed(module, item) for item in (0, 1)]
    latents, noise, timesteps = module.noised(module.latents[0], generators)
    with torch.no_grad(), module.pipeline.texts[0].learned(module.values[0], module.prompts[0].tokens.slots[0]):
        conditions = module.pipeline.texts[0].states(module.prompts[0].tokens.ids[0])
        noisy = add_noise(module.pipeline.scheduler, latents, noise, timesteps)
        expected = F.mse_loss(module.unet(noisy, timesteps, conditions).sample, noise)
    assert_close(loss.detach(), expected, rtol=1e-5, atol=0)


def attacking(module: RobustErasure, fit: Fit) -> RobustErasure:
    """``module`` before the first step of its first attack, able to take steps without a trainer."""
    with pytest.raises(Interrupted):
        fit(module, soft(), interrupt("on_train_batch_start", epoch=1), steps=1, batch_size=2)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # nothing to log to
    return module


def module_seed(module: RobustErasure, item: int) -> torch.Generator:
    from lit_unlearn.core.seeds import seeded

    return seeded(module.seed, 1, 0, 0, item)


def test_each_concept_has_a_token_of_its_own(robust: Build, fit: Fit) -> None:
    module = attacking(robust(concept=["dog", "cat"], retain=["a bird"]), fit)
    module.training_step(torch.tensor([0, 1]), 0).backward()
    alone = attacking(robust(concept="dog", retain=["a bird"]), fit)
    assert module.values.shape == (1, 2, 32)
    assert module.values.grad[0].norm(dim=-1).gt(0).all()
    # The cat's error is not in the dog's gradient. Both models are edited differently, so take the same one.
    for name in KV:
        alone.layers[name].weight.data.copy_(module.layers[name].weight)
    alone.training_step(torch.tensor([0, 1]), 0).backward()
    assert_close(module.values.grad[:, :1], alone.values.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
def test_an_interrupted_run_ends_with_the_same_weights(robust: Build, fit: Fit, tmp_path: Path) -> None:
    whole = robust(rounds=2)
    fit(whole, soft(), steps=3, batch_size=2)
    saved = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(Interrupted):
        fit(robust(rounds=2), soft(), saved, interrupt("on_train_batch_start", step=8), steps=3, batch_size=2)
    resumed = robust(rounds=2)
    fit(resumed, soft(), steps=3, batch_size=2, ckpt_path=tmp_path / "saved" / "step=7.ckpt")
    assert changed(weights(whole), weights(resumed)) == []
    assert changed(weights(whole), {**weights(whole), **whole.pretrained.values}) != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": -1}, "model.rounds=-1 must be at least 0"),
        ({"found_prompts": 0}, "model.found_prompts=0 must be at least 1"),
        ({"guidance_edit": -0.5}, "model.guidance_edit=-0.5 must be zero or a positive number"),
        ({"found_weight": 0.0}, "model.found_weight=0 makes no use of 1 rounds"),
        ({"retain": ["my dog"]}, "model.retain has 'my dog', which names the edited concept 'dog'"),
        ({"concept": ["dog", "cat"]}, "leaves no prompt of .* name what to keep in model.retain"),
        ({"edited_parameters": "text-fc2"}, "edits only the maps that read text first"),
    ],
)
def test_settings_without_sense_are_refused(arguments: dict[str, Any], message: str, robust: Build) -> None:
    with pytest.raises(ValueError, match=message):
        robust(**arguments)
