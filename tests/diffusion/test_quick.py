"""Drawing computes what all steps and batches share only once, and no bit of a picture changes."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from lit_unlearn.diffusion import samplers
from lit_unlearn.diffusion.families import StableDiffusion

STEPS = 3


def test_batches_encode_the_empty_prompt_and_make_the_sampler_once(
    components: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, made = [], []
    make = type(components.scheduler).from_config
    monkeypatch.setattr(type(components.scheduler), "from_config", lambda config: made.append(1) or make(config))
    monkeypatch.setattr(samplers, "_READY", {})
    hook = components.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    together = components.draw(["a dog", "a cat", "a bird"], [0, 1, 2], STEPS, 4.0, batch_size=1)
    hook.remove()
    assert encoded == [1, 1, 1, 1]
    assert len(made) == 1
    alone = [components.draw([prompt], [seed], STEPS, 4.0) for seed, prompt in enumerate(["a dog", "a cat", "a bird"])]
    assert torch.equal(together, torch.cat(alone))


def test_drawing_computes_keys_of_the_text_once_and_changes_no_bit(components: StableDiffusion) -> None:
    layers = [m.to_k for name, m in components.unet.named_modules() if name.endswith("attn2")]
    calls: list[int] = []
    condition, noise = components.encode(["a dog"]), components.initial_noise([0])
    *_, last = components.chain(components.guided(condition, 4.0), noise, STEPS, 4.0)
    with patch.object(layers[0], "forward", side_effect=layers[0].forward) as replaced:
        # A layer whose ``forward`` is replaced already is called in every step.
        assert torch.equal(components.sample(condition, noise, STEPS, 4.0), last.latents)
        calls.append(replaced.call_count)
    with patch("torch.nn.Linear.forward", autospec=True, side_effect=torch.nn.Linear.forward) as linear:
        assert torch.equal(components.sample(condition, noise, STEPS, 4.0), last.latents)
        calls.append(sum(call.args[0] is layers[0] for call in linear.call_args_list))
    assert calls == [STEPS, 1]
    assert not any("forward" in vars(module) for module in components.unet.modules())


def test_a_sampler_that_inference_mode_has_asked_for_may_be_used_in_training(
    components: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "_READY", {})
    with torch.inference_mode():
        components.draw(["a dog"], [0], STEPS, 4.0)
    assert not components.noise.timesteps(STEPS).is_inference()
