from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import load_copy
from lit_unlearn.diffusion.attention import RecordingProcessor, record_attention
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.diffusion.sampling import initial_noise

PROMPTS = ["a dog", "an owl at sunset"]
TIMESTEPS = torch.tensor([100, 800])


@pytest.fixture(params=["tiny_sd", "tiny_sd2", "emoji-sd"])
def any_components(request: pytest.FixtureRequest) -> StableDiffusion:
    model = request.param if request.param == "emoji-sd" else str(request.getfixturevalue(request.param))
    return load_copy(model)


def inputs(components: StableDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    states = encode_prompts(components.tokenizer, components.text_encoder, PROMPTS)
    return initial_noise(components.unet, [0, 1]), TIMESTEPS, states


def test_the_output_stays_and_the_probabilities_are_those_of_queries_and_keys(
    any_components: StableDiffusion,
) -> None:
    unet = any_components.unet
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, Attention) and n.endswith("attn2")}
    projections = {f"{n}.{p}": getattr(m, p) for n, m in layers.items() for p in ("to_q", "to_k")}
    with torch.no_grad():
        before = unet(*inputs(any_components)).sample
        with record_attention(unet) as record, capture_inputs(projections) as captured:
            recorded = unet(*inputs(any_components)).sample
    # Float32, by one fused kernel and by two products.
    assert_close(recorded, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert set(record) == set(layers)
    for name, attn in layers.items():
        query, key = (projections[f"{name}.{p}"](captured[f"{name}.{p}"]) for p in ("to_q", "to_k"))
        width = query.shape[-1] // attn.heads
        for item in range(2):
            for head in range(attn.heads):
                columns = slice(head * width, (head + 1) * width)
                scores = query[item, :, columns] @ key[item, :, columns].T / width**0.5
                assert_close(record[name][item, head], scores.softmax(-1), rtol=1e-4, atol=1e-6)
        assert record[name].shape == (2, attn.heads, query.shape[1], 32)
        assert_close(record[name].sum(-1), torch.ones(record[name].shape[:-1]), rtol=0, atol=1e-5)
        # Trained or random, attention is not even: the columns of a prompt's tokens say something.
        assert record[name].std(-1).max() > 1e-3


def test_processors_return_also_after_an_error(components: StableDiffusion) -> None:
    unet = components.unet
    before = dict(unet.attn_processors)
    with record_attention(unet):
        swapped = {n for n, p in unet.attn_processors.items() if isinstance(p, RecordingProcessor)}
    assert swapped == {name for name in before if ".attn2." in name}
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    with pytest.raises(KeyError), record_attention(unet):
        raise KeyError
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_gradients_flow_into_queries_and_keys(components: StableDiffusion) -> None:
    unet = components.unet.requires_grad_(True)
    with record_attention(unet) as record:
        unet(*inputs(components))
    last = list(record)[-1]
    record[last][..., 1].sum().backward()
    layer = unet.get_submodule(last)
    assert layer.to_q.weight.grad.abs().max() > 0
    assert layer.to_k.weight.grad.abs().max() > 0
    assert layer.to_v.weight.grad is None  # its values come after its attention
    assert unet.conv_in.weight.grad.abs().max() > 0


def test_a_mask_of_the_prompt_is_obeyed(components: StableDiffusion) -> None:
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[0, 5:] = False
    with torch.no_grad():
        before = components.unet(*inputs(components), encoder_attention_mask=mask).sample
        with record_attention(components.unet) as record:
            recorded = components.unet(*inputs(components), encoder_attention_mask=mask).sample
    assert_close(recorded, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    for probabilities in record.values():
        assert probabilities[0, ..., 5:].max() == 0
        assert probabilities[1, ..., 5:].min() > 0


class Wrapper(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn2 = Attention(query_dim=8, heads=2, dim_head=4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"cross_attention_dim": 6, "bias": True}, (2, 9, 8)),
        ({"cross_attention_dim": 6, "norm_num_groups": 4}, (2, 9, 8)),
        ({"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"}, (2, 9, 8)),
        (
            {"cross_attention_dim": 6, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
            (2, 9, 8),
        ),
        ({"cross_attention_dim": 6, "qk_norm": "layer_norm"}, (2, 9, 8)),
        ({"cross_attention_dim": 6, "upcast_attention": True, "upcast_softmax": True}, (2, 9, 8)),
        ({"cross_attention_dim": 6, "residual_connection": True, "rescale_output_factor": 2.0}, (2, 8, 3, 3)),
        ({"cross_attention_dim": 6, "scale_qk": False}, (2, 9, 8)),
    ],
    ids=lambda value: "+".join(key for key in value if key != "cross_attention_dim") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("make_mask", [lambda: None, lambda: torch.randn(2, 1, 5)], ids=["", "mask"])
def test_every_option_of_the_layer_is_that_of_diffusers(
    arguments: dict[str, Any], shape: tuple[int, ...], make_mask: Callable[[], Tensor | None]
) -> None:
    layer = Wrapper(**arguments)
    torch.manual_seed(1)
    hidden_states, states, mask = torch.randn(shape), torch.randn(2, 5, 6), make_mask()
    assert isinstance(layer.attn2.processor, AttnProcessor2_0 if layer.attn2.scale_qk else AttnProcessor)
    before = layer.attn2(hidden_states, states, mask)
    with record_attention(layer) as record:
        recorded = layer.attn2(hidden_states, states, mask)
    assert_close(recorded, before, rtol=0, atol=1e-6)  # float32, fused and not
    assert record["attn2"].shape == (2, 2, 9, 5)
    assert_close(record["attn2"].sum(-1), torch.ones(2, 2, 9), rtol=0, atol=1e-6)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="has no layer named attn2"), record_attention(nn.Linear(2, 2)):
        pass

    class Adapter(nn.Module):
        pass

    layer = Wrapper(cross_attention_dim=6)
    layer.attn2.processor = Adapter()
    with pytest.raises(ValueError, match="attn2 attends through Adapter: unload the adapter"), record_attention(layer):
        pass
    assert isinstance(layer.attn2.processor, Adapter)
