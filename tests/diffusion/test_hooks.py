from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.hooks import begin_at, capture_inputs, replace_output
from lit_unlearn.diffusion.prompts import encode, tokenize

PROMPTS = ["a dog", "an owl at sunset"]


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_captured_keys_are_what_the_layer_reads(components: StableDiffusion) -> None:
    text_encoder = components.text_encoder
    ids = tokenize(components.tokenizer, PROMPTS)
    layers = {"first": text_encoder.encoder.layers[0].mlp.fc2, "last": text_encoder.encoder.layers[2].mlp.fc2}
    with capture_inputs(layers) as keys:
        states = encode(text_encoder, ids)
    assert set(keys) == {"first", "last"}
    hidden = text_encoder(ids, output_hidden_states=True).hidden_states
    for name, number in (("first", 0), ("last", 2)):
        block = text_encoder.encoder.layers[number]
        after_attention = hidden[number + 1] - layers[name](keys[name])  # the block adds the MLP to what it had
        manual = block.mlp.activation_fn(block.mlp.fc1(block.layer_norm2(after_attention)))
        # The residual is recovered by a subtraction of numbers of order 10, so a few digits are lost.
        assert_close(keys[name], manual, rtol=0, atol=1e-3)
        assert keys[name].shape == (2, 32, 128)
    assert torch.equal(states, encode(text_encoder, ids))


def test_layers_that_are_left_out_are_as_before_also_after_an_error(components: StableDiffusion) -> None:
    stack = components.text_encoder.encoder
    first, second, last = stack.layers
    own = first.forward = lambda *_, **__: torch.zeros(1)  # as a hook of accelerate
    with pytest.raises(KeyError), begin_at(stack, 2, torch.ones(1)):
        assert first(None, None) == second(None, None) == 1
        assert "forward" not in vars(last)
        raise KeyError
    assert first.forward is own and "forward" not in vars(second)


def test_captured_keys_are_detached_and_the_latest() -> None:
    layer = nn.Linear(3, 2)
    with capture_inputs({"layer": layer}) as keys:
        layer(torch.zeros(1, 4, 3))
        inputs = torch.ones(1, 4, 3, requires_grad=True)
        layer(inputs)
    assert torch.equal(keys["layer"], inputs)
    assert not keys["layer"].requires_grad
    layer(torch.zeros(1, 4, 3))
    assert torch.equal(keys["layer"], inputs)


def test_values_stand_where_the_mask_is_true_and_nowhere_else() -> None:
    layer = nn.Linear(3, 2)
    inputs, values = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    plain = layer(inputs)
    with replace_output(layer, values, mask):
        replaced = layer(inputs)
    assert torch.equal(replaced[~mask], plain[~mask])
    assert torch.equal(replaced[mask], (values + layer.bias)[mask])
    assert not torch.isclose(replaced[mask], plain[mask]).any()
    assert torch.equal(layer(inputs), plain)


def test_values_of_a_layer_without_bias() -> None:
    layer = nn.Linear(3, 2, bias=False)
    values = torch.randn(1, 4, 2)
    with replace_output(layer, values, torch.ones(1, 4, dtype=torch.bool)):
        assert torch.equal(layer(torch.randn(1, 4, 3)), values)


def test_the_present_values_change_nothing(components: StableDiffusion) -> None:
    text_encoder, layer = components.text_encoder, components.text_encoder.encoder.layers[1].mlp.fc2
    ids = tokenize(components.tokenizer, PROMPTS)
    with capture_inputs({"layer": layer}) as keys:
        states = encode(text_encoder, ids)
    with replace_output(layer, keys["layer"] @ layer.weight.mT, torch.ones(2, 32, dtype=torch.bool)):
        # The same product, with the bias added afterwards: float32 rounding of states of order 1.
        assert_close(encode(text_encoder, ids), states, rtol=0, atol=1e-5)
    with replace_output(layer, -keys["layer"] @ layer.weight.mT, torch.ones(2, 32, dtype=torch.bool)):
        assert (encode(text_encoder, ids) - states).abs().max() > 0.1


def test_gradients_reach_the_masked_values_through_the_rest_of_the_encoder(components: StableDiffusion) -> None:
    text_encoder, layer = components.text_encoder, components.text_encoder.encoder.layers[1].mlp.fc2
    ids = tokenize(components.tokenizer, PROMPTS)
    values = torch.randn(2, 32, 32, requires_grad=True)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[0, 3] = mask[1, 5:] = True
    with replace_output(layer, values, mask):
        encode(text_encoder, ids).square().sum().backward()
    assert values.grad is not None
    assert (values.grad[mask].abs().amax(dim=-1) > 0).all()
    assert not values.grad[~mask].any()


def test_values_in_float32_enter_a_layer_in_half_precision() -> None:
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    values = torch.randn(1, 4, 2, requires_grad=True)
    with replace_output(layer, values, torch.ones(1, 4, dtype=torch.bool)):
        output = layer(torch.randn(1, 4, 3, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_hooks_remove_themselves_whatever_happens(components: StableDiffusion) -> None:
    text_encoder = components.text_encoder
    layer = text_encoder.encoder.layers[1].mlp.fc2
    before = hooks_of(text_encoder)
    values, mask = torch.zeros(1, 32, 32), torch.ones(1, 32, dtype=torch.bool)
    with capture_inputs({"a": layer, "b": text_encoder.final_layer_norm}), replace_output(layer, values, mask):
        assert hooks_of(text_encoder) == before + 3
    assert hooks_of(text_encoder) == before
    with pytest.raises(RuntimeError, match="on purpose"), capture_inputs({"a": layer}):
        raise RuntimeError("on purpose")
    with pytest.raises(RuntimeError, match="on purpose"), replace_output(layer, values, mask):
        raise RuntimeError("on purpose")
    # A mask of a wrong shape fails inside the hook, in the middle of a forward.
    with pytest.raises(RuntimeError), replace_output(layer, values, torch.ones(1, 7, dtype=torch.bool)):
        encode(text_encoder, tokenize(components.tokenizer, ["a dog"]))
    assert hooks_of(text_encoder) == before
