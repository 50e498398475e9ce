"""What the null-space edit of the UNet selects, in which order, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import FF, KV
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.parameters import call_order, num_places
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement, UNetValueRefinement

Build = Callable[..., Any]


def test_layers_come_in_the_order_of_the_unets_calls(keys_and_values: Build, feed_forward: Build) -> None:
    for build, names in ((keys_and_values, KV), (feed_forward, FF)):
        module = build()
        module.configure_model()
        assert module.edited_names == names
        called: list[str] = []
        for name, layer in module.layers.items():
            layer.register_forward_hook(lambda *_, called=called, name=name: called.append(name))
        sample = torch.zeros(1, 4, 8, 8)
        module.unet(sample, 10, torch.zeros(1, 32, 32))
        assert called == names


def test_order_is_by_number_and_not_by_digit() -> None:
    names = [f"unet.down_blocks.{n}.attentions.0.transformer_blocks.0.ff.net.2.weight" for n in (10, 2)]
    assert sorted(names, key=call_order) == names[::-1]


@pytest.mark.parametrize("side", [8, 12, 64])
def test_places_are_those_of_the_blocks_picture(feed_forward: Build, side: int) -> None:
    module = feed_forward()
    module.configure_model()
    with torch.no_grad(), capture_inputs(module.layers) as captured:
        module.unet(torch.zeros(1, 4, side, side), 10, torch.zeros(1, 32, 32))
    config = {**module.unet.config, "sample_size": side}
    assert {name: num_places(config, name) for name in FF} == {name: captured[name].shape[1] for name in FF}


def test_places_of_stable_diffusion() -> None:
    config = {"sample_size": 64, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    names = ["down_blocks.0.x", "down_blocks.2.x", "mid_block.x", "up_blocks.1.x", "up_blocks.3.x"]
    assert [num_places(config, f"unet.{name}") for name in names] == [64**2, 16**2, 8**2, 16**2, 64**2]


@pytest.mark.parametrize(
    ("kind", "arguments", "problem"),
    [
        (
            UNetValueRefinement,
            {"edited_parameters": "text-fc2"},
            "'text-fc2' selects text_encoder.*edits only the maps that read text first",
        ),
        (
            UNetValueRefinement,
            {"edited_parameters": "xattn"},
            r"attn2\.to_out.* edits only the maps that read text first",
        ),
        (
            UNetFeedForwardRefinement,
            {"edited_parameters": "xattn-kv"},
            r"edits only ff\.net\.2\.weight and .*add_v_proj\.weight of the unet",
        ),
        (UNetFeedForwardRefinement, {"edited_parameters": r"ff\.net\.2"}, r"selects .*net\.2\.bias"),
        (UNetValueRefinement, {"edited_parameters": "nothing"}, "'nothing' selects no parameter"),
        (
            UNetValueRefinement,
            {"values": "residual"},
            "values='residual' is not possible for UNetValueRefinement: choose refined",
        ),
        (
            UNetFeedForwardRefinement,
            {"start": "residual"},
            "start='residual' is not possible for UNetFeedForward.*output or tar",
        ),
        (UNetValueRefinement, {"watched_prompts": 0}, r"model\.watched_prompts=0 must be at least 1"),
        (UNetFeedForwardRefinement, {"noises_per_prompt": 0}, r"model\.noises_per_prompt=0 must be at least 1"),
        (UNetFeedForwardRefinement, {"noises_per_retained_prompt": 0}, "noises_per_retained_prompt=0 must be at least"),
        (UNetValueRefinement, {"concept": ["dog", "cat"]}, "leaves no prompt of pets to retain"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_loads(
    kind: type, arguments: dict[str, Any], problem: str, refinement: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        refinement(kind, **arguments)
