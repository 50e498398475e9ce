from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.func import functional_call

from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.parameters import (
    GROUPS,
    PretrainedValues,
    fingerprint,
    layer_index,
    layer_label,
    match_parameters,
)
from lit_unlearn.diffusion.prompts import encode, tokenize


def attention_parameters(unet: nn.Module, cross: bool, only: tuple[str, ...] = ("",)) -> set[str]:
    """Parameters of cross or self attention, told apart by what the modules say of themselves, not by their names."""
    return {
        f"unet.{path}.{name}"
        for path, module in unet.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention == cross
        for name, _ in module.named_parameters()
        if name.startswith(only)
    }


def test_groups_select_what_they_say(components: StableDiffusion) -> None:
    unet, names = components.unet, list(components.named_parameters())
    everything = {f"unet.{name}" for name, _ in unet.named_parameters()}
    cross = attention_parameters(unet, cross=True)
    expected = {
        "xattn": cross,
        "xattn-kv": attention_parameters(unet, cross=True, only=("to_k", "to_v")),
        "xattn-v": attention_parameters(unet, cross=True, only=("to_v",)),
        "noxattn": {
            name
            for name in everything - cross
            if not name.startswith(("unet.conv_norm_out.", "unet.conv_out.", "unet.time_embedding."))
        },
        "esd-u": {
            f"unet.{path}.{name}"
            for path, module in unet.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and "attn2" not in path
            for name, _ in module.named_parameters()
        },
        "selfattn": attention_parameters(unet, cross=False),
        "full": everything,
        "context": attention_parameters(unet, cross=True, only=("to_k", "to_v")),
        "embedding": {"text_encoder.embeddings.token_embedding.weight"},
        "text-fc1": {f"text_encoder.encoder.layers.{i}.mlp.fc1.weight" for i in range(3)},
        "text-fc2": {f"text_encoder.encoder.layers.{i}.mlp.fc2.weight" for i in range(3)},
    }
    assert {*expected, "joint-kv"} == set(GROUPS)  # a UNet has no joint attention
    for group, parameters in expected.items():
        selected = match_parameters(group, names)
        assert set(selected) == parameters, group
        assert selected == [name for name in names if name in parameters], group
    # One transformer block in the down, one in the mid, two in the up path; two biasless maps in each.
    assert len(expected["xattn-kv"]) == 2 * 4


def test_cross_attention_of_stable_diffusion_1_has_its_known_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    sizes = {f"unet.{name}": parameter.numel() for name, parameter in unet.named_parameters()}
    assert sum(sizes.values()) == 859_520_964
    selected = match_parameters("xattn-kv", sizes)
    assert (len(selected), sum(sizes[name] for name in selected)) == (32, 19_169_280)


def test_a_pattern_is_searched_in_full_names() -> None:
    names = ["unet.a.weight", "text_encoder.a.weight", "unet.a.bias"]
    assert match_parameters(r"a\.weight$", names) == ["unet.a.weight", "text_encoder.a.weight"]
    assert match_parameters("^unet", names) == ["unet.a.weight", "unet.a.bias"]


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"edited_parameters='\(' is not a regular expression"):
        match_parameters("(", ["unet.a.weight"])


def test_an_empty_selection_names_the_groups_and_a_parameter() -> None:
    with pytest.raises(ValueError, match="selects no parameter") as error:
        match_parameters("decoder", ["unet.a.bias", "unet.b.weight"])
    assert all(group in str(error.value) for group in GROUPS)
    assert "'unet.b.weight'" in str(error.value)
    with pytest.raises(ValueError, match="selects no parameter"):
        match_parameters("xattn", [])


def test_a_misspelt_group_is_answered_with_the_closest() -> None:
    with pytest.raises(ValueError, match="such as 'text-fc2'"):
        match_parameters("text_fc2", ["unet.a.weight"])


def test_the_number_of_a_text_layer() -> None:
    assert layer_index("text_encoder.encoder.layers.11.mlp.fc2.weight") == 11
    assert layer_index("text_encoder.text_model.encoder.layers.3.mlp.fc2.weight") == 3
    with pytest.raises(ValueError, match="not in a numbered layer"):
        layer_index("text_encoder.embeddings.token_embedding.weight")


# --- fingerprints


def test_a_fingerprint_changes_with_any_bit() -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.tensor([0.0, 1.0])}
    original = fingerprint(weights)
    assert fingerprint({name: weights[name].clone() for name in ("b", "a")}) == original

    def bit_flipped(name: str, place: int, bit: int) -> dict[str, torch.Tensor]:
        changed = {key: value.clone() for key, value in weights.items()}
        changed[name].view(torch.int32).view(-1)[place] ^= 1 << bit
        return changed

    others = [bit_flipped("a", place, bit) for place in (0, 11) for bit in (0, 15, 30)]
    others += [
        bit_flipped("b", 0, 0),
        {**weights, "b": torch.tensor([-0.0, 1.0])},
        {"a": weights["a"]},
        {"a": weights["a"], "c": weights["b"]},
        {**weights, "a": weights["a"].view(4, 3)},
        {**weights, "b": weights["b"].to(torch.bfloat16)},
        {**weights, "b": weights["b"].view(torch.int32)},
    ]
    found = [fingerprint(other) for other in others]
    assert original not in found
    assert len(set(found)) == len(found)


def test_a_fingerprint_is_of_values_not_of_memory() -> None:
    weight = torch.randn(4, 6, 3, 3)
    assert fingerprint({"w": weight.to(memory_format=torch.channels_last)}) == fingerprint({"w": weight})
    assert fingerprint({"w": weight.mT.contiguous().mT}) == fingerprint({"w": weight})
    assert fingerprint({"w": nn.Parameter(weight)}) == fingerprint({"w": weight})
    assert fingerprint({"s": torch.tensor(1.0)}) != fingerprint({"s": torch.tensor(2.0)})


# --- the frozen reference


def edit_in_place(parameters: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.5).add_(0.1)


def optimizer_step(parameters: dict[str, nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    torch.stack([parameter.square().sum() for parameter in parameters.values()]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("edit", [edit_in_place, optimizer_step])
@pytest.mark.parametrize("group", ["xattn", "full"])
def test_the_reference_equals_a_copy_made_before_the_edit(
    group: str, edit: object, components: StableDiffusion
) -> None:
    unet, parameters = components.unet, components.named_parameters()
    edited = {name: parameters[name].requires_grad_() for name in match_parameters(group, parameters)}
    pretrained, reference = PretrainedValues(edited), copy.deepcopy(unet)
    edit(edited)
    latents, timesteps, states = torch.randn(2, 4, 8, 8), torch.tensor([9, 700]), torch.randn(2, 32, 32)
    values = pretrained.of("unet")
    assert not any(value.requires_grad for value in values.values())
    with torch.no_grad():
        ours = functional_call(unet, values, (latents, timesteps, states)).sample
        assert torch.equal(ours, reference(latents, timesteps, encoder_hidden_states=states).sample)
        live = unet(latents, timesteps, encoder_hidden_states=states).sample
    assert (live - ours).abs().max() > 1e-3


def test_values_of_one_part_stay_out_of_the_other(components: StableDiffusion) -> None:
    parameters = components.named_parameters()
    names = ["text_encoder.encoder.layers.1.mlp.fc2.weight", "unet.conv_in.weight"]
    pretrained = PretrainedValues({name: parameters[name] for name in names})
    ids = tokenize(components.tokenizer, ["a dog"])
    before = encode(components.text_encoder, ids)
    edit_in_place({name: parameters[name] for name in names})
    assert set(pretrained.of("text_encoder")) == {"encoder.layers.1.mlp.fc2.weight"}
    assert set(pretrained.of("unet")) == {"conv_in.weight"}
    assert pretrained.of("vae") == {}
    again = functional_call(components.text_encoder, pretrained.of("text_encoder"), (ids,))
    assert torch.equal(again.last_hidden_state, before)
    assert not torch.equal(encode(components.text_encoder, ids), before)


def test_values_are_restored_for_a_block_and_the_edit_comes_back(components: StableDiffusion) -> None:
    parameters = {name: p for name, p in components.named_parameters().items() if ".attn2." in name}
    original = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    pretrained = PretrainedValues(parameters)
    edit_in_place(parameters)
    edited = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def holds(values: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(parameters[name], value) for name, value in values.items())

    assert holds(edited) and not holds(original)
    with pretrained.restored():
        assert holds(original)
        assert all(components.named_parameters()[name] is parameter for name, parameter in parameters.items())
    assert holds(edited)
    with pytest.raises(RuntimeError, match="on purpose"), pretrained.restored():
        raise RuntimeError("on purpose")
    assert holds(edited)


def test_the_change_ratio_is_that_of_all_numbers_in_one_vector() -> None:
    parameters = {"a": nn.Parameter(torch.randn(5, 7)), "b": nn.Parameter(torch.randn(3))}
    pretrained = PretrainedValues(parameters)
    assert pretrained.change_ratio() == 0
    before = [x for parameter in parameters.values() for x in parameter.flatten().tolist()]
    edit_in_place(parameters)
    after = [x for parameter in parameters.values() for x in parameter.flatten().tolist()]
    change = math.sqrt(sum((x - y) ** 2 for x, y in zip(after, before, strict=True)))
    # Both sides are in float64, so they agree to its rounding.
    assert pretrained.change_ratio() == pytest.approx(change / math.sqrt(sum(x * x for x in before)), rel=1e-12)


def test_the_change_of_each_weight_by_itself() -> None:
    parameters = {name: nn.Parameter(torch.full((2, 2), 3.0)) for name in ("moved", "still")}
    parameters["zero"] = nn.Parameter(torch.zeros(4))
    pretrained = PretrainedValues(parameters)
    with torch.no_grad():
        parameters["moved"].add_(1.5)
    assert pretrained.change_ratios() == {"moved": 0.5, "still": 0.0, "zero": 0.0}
    with torch.no_grad():
        parameters["zero"].add_(1.0)
    assert pretrained.change_ratios()["zero"] == math.inf


def test_a_small_change_of_half_precision_weights_is_not_lost() -> None:
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    pretrained = PretrainedValues({"w": weight})
    with torch.no_grad():
        weight[0] = 1 + 2**-7
    assert pretrained.change_ratio() == pytest.approx(2**-7 / math.sqrt(1000), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("text_encoder.encoder.layers.11.mlp.fc2.weight", "layer 11"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", "down 1.0 K"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight", "mid 0 V"),
        ("unet.up_blocks.10.attentions.1.transformer_blocks.2.ff.net.2.weight", "up 10.1.2 FF"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", "mid 0 attn1.to_q"),
    ],
)
def test_layers_have_short_names(name: str, label: str) -> None:
    assert layer_label(name) == label
