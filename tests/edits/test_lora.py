"""Low-rank exports: the best change of their rank, with names that diffusers reads as LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_unlearn.core.uce import shared_map
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.lora_names import STABLE_DIFFUSION, LoraNames, Naming
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.edits.lora import AUTO_RESIDUAL, low_rank, notable_loss, parse_rank

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
TEXT = "text_encoder.encoder.layers.1.mlp.fc2.weight"
CONVOLUTION = "unet.mid_block.resnets.0.conv1.weight"


@pytest.fixture
def base(components: StableDiffusion) -> dict[str, Tensor]:
    parameters = components.named_parameters()
    return {name: parameters[name].detach() for name in (LINEAR, TEXT, CONVOLUTION)}


def changed(base: dict[str, Tensor], ranks: dict[str, int]) -> dict[str, Tensor]:
    """``base`` plus random matrices of the given ranks."""
    generator = torch.Generator().manual_seed(0)
    edited = {}
    for name, rank in ranks.items():
        rows, columns = base[name].flatten(1).shape
        change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        edited[name] = base[name] + change.reshape(base[name].shape)
    return edited


def product(factors: dict[str, Tensor], name: str) -> Tensor:
    a, b = (factors[f"{STABLE_DIFFUSION.layer(name)}.lora_{side}.weight"] for side in ("down", "up"))
    assert factors[f"{STABLE_DIFFUSION.layer(name)}.alpha"] == len(a)  # so that a loader scales by one
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def test_base_plus_b_a_is_the_edit(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1, TEXT: 3, CONVOLUTION: 2})
    factors, report = low_rank(edited, base, None)
    assert report["rank"] == 3
    assert report["needed_rank"] == {LINEAR: 1, TEXT: 3, CONVOLUTION: 2}
    for name, value in edited.items():
        assert not torch.allclose(base[name], value, atol=1e-2)
        assert torch.allclose(base[name] + product(factors, name), value, atol=1e-4)
        assert report["residual"][name] < 1e-6
    # One rank for all: loaders that take alpha from the first layer then scale every layer by one.
    assert {value.shape[0] for name, value in factors.items() if "lora_down" in name} == {3}
    rows, columns = base[CONVOLUTION].shape[:2]
    layer = STABLE_DIFFUSION.layer(CONVOLUTION)
    assert factors[f"{layer}.lora_down.weight"].shape == (3, columns, 3, 3)
    assert factors[f"{layer}.lora_up.weight"].shape == (rows, 3, 1, 1)


def test_a_smaller_rank_leaves_out_what_eckart_and_young_say(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 6})
    factors, report = low_rank(edited, base, 2)
    singular = torch.linalg.svdvals((edited[LINEAR] - base[LINEAR]).double())
    expected = float(singular[2:].norm() / singular.norm())
    assert expected > 0.1
    assert report["residual"][LINEAR] == pytest.approx(expected, rel=1e-4)
    missing = edited[LINEAR] - base[LINEAR] - product(factors, LINEAR)
    assert float(missing.norm() / (edited[LINEAR] - base[LINEAR]).norm()) == pytest.approx(expected, rel=1e-4)


def test_auto_stops_at_its_residual(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1})
    edited[LINEAR] = edited[LINEAR] + 1e-6 * torch.randn(edited[LINEAR].shape)  # noise of full rank
    _, report = low_rank(edited, base, None)
    assert report["rank"] == 1
    assert 0 < report["residual"][LINEAR] <= AUTO_RESIDUAL


@pytest.mark.parametrize("count", [1, 4])
def test_an_edit_of_a_few_states_is_an_exact_lora_of_their_number(base: dict[str, Tensor], count: int) -> None:
    """UCE's change is W B with B of that rank; what the stored weights add is their rounding."""
    weight = base[LINEAR]
    generator = torch.Generator().manual_seed(1)
    keys, guides = (torch.randn(count, weight.shape[1], generator=generator) for _ in range(2))
    edited = {LINEAR: (weight.double() + shared_map(keys, guides).change(weight)).float()}
    factors, report = low_rank(edited, base, "exact")
    assert report["rank"] == count
    missing = base[LINEAR] + product(factors, LINEAR) - edited[LINEAR]
    assert missing.norm() <= 2 * torch.finfo(torch.float32).eps * edited[LINEAR].norm()
    if count > 1:
        fewer = base[LINEAR] + product(low_rank(edited, base, count - 1)[0], LINEAR) - edited[LINEAR]
        assert fewer.norm() > 1e3 * missing.norm()


def test_an_exact_lora_that_is_as_large_as_the_weights_is_refused(base: dict[str, Tensor]) -> None:
    rank = min(base[LINEAR].shape)
    with pytest.raises(ValueError, match=rf"lora='exact' needs rank {rank}, .* use --delta, or --lora auto"):
        low_rank(changed(base, {LINEAR: rank}), base, "exact")


def test_a_rank_beyond_the_layers_is_cut_and_half_precision_is_counted(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 2})
    factors, report = low_rank(edited, base, 10_000, torch.float16)
    assert report["rank"] == min(base[LINEAR].shape)
    assert {value.dtype for name, value in factors.items() if "alpha" not in name} == {torch.float16}
    assert 1e-6 < report["residual"][LINEAR] < 1e-2


def test_names_are_those_of_kohya(base: dict[str, Tensor]) -> None:
    factors, _ = low_rank(changed(base, {LINEAR: 1, TEXT: 1}), base, 1)
    layers = (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_te_text_model_encoder_layers_1_mlp_fc2",
    )
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(factors) == {f"{layer}.{end}" for layer in layers for end in ends}


@pytest.mark.parametrize("layer", ["q_proj", "k_proj", "v_proj"])
def test_text_attention_has_the_layer_by_which_diffusers_knows_it(components: StableDiffusion, layer: str) -> None:
    parameters = components.named_parameters()
    name = f"text_encoder.encoder.layers.1.self_attn.{layer}.weight"
    output = "text_encoder.encoder.layers.1.self_attn.out_proj.weight"
    base = {part: parameters[part].detach() for part in (name, output)}
    factors, _ = low_rank(changed(base, {name: 1}), base, 1)
    assert product(factors, output).shape == base[output].shape
    assert not product(factors, output).any()
    both, _ = low_rank(changed(base, {name: 1, output: 1}), base, 1)
    assert product(both, output).any()


def test_a_notable_loss_is_said_with_the_rank_that_has_none(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1, TEXT: 6})
    _, report = low_rank(edited, base, 2)
    sentence = notable_loss(report)
    assert sentence is not None
    assert f"leaves out {report['residual'][TEXT]:.0%} of the change of {TEXT}" in sentence
    assert f"rank {report['notable_rank']} would keep 95%" in sentence and "--lora auto 99.9% (rank 6)" in sentence
    assert max(low_rank(edited, base, report["notable_rank"])[1]["residual"].values()) <= 0.05
    assert max(low_rank(edited, base, report["notable_rank"] - 1)[1]["residual"].values()) > 0.05
    assert notable_loss(low_rank(edited, base, None)[1]) is None


@pytest.mark.parametrize("name", ["unet.conv_in.bias", "text_encoder.embeddings.token_embedding.weight"])
def test_what_lora_cannot_hold_is_refused_by_name(components: StableDiffusion, name: str) -> None:
    value = components.named_parameters()[name]
    assert not STABLE_DIFFUSION.fits(name, value)
    with pytest.raises(ValueError, match=rf"the edit changes {name}, which LoRA cannot hold"):
        low_rank({name: value + 1}, {name: value}, 1)


XL = ("unet", "text_encoder", "text_encoder_2")
FLOW = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
CLIP_2 = "text_encoder_2.text_model.encoder.layers.3"


@pytest.mark.parametrize(
    ("parts", "names", "other"),
    [
        (XL, ["unet.add_embedding.linear_1.weight"], "unet.add_embedding.linear_1.weight"),
        (FLOW, ["transformer.context_embedder.weight"], "transformer.context_embedder.weight"),
        (FLOW, [TEXT, f"{CLIP_2}.mlp.fc2.weight"], f"{TEXT} and 1 more"),
    ],
)
def test_what_diffusers_reads_only_by_its_own_names_is_refused_with_that_advice(
    parts: tuple[str, ...], names: list[str], other: str
) -> None:
    edited, base = ({name: fill(4, 4) for name in names} for fill in (torch.ones, torch.zeros))
    reason = (
        f"lora: the edit changes {other}, which diffusers does not read by kohya's names: pass --lora_names diffusers"
    )
    with pytest.raises(ValueError, match=f"^{reason}, use --delta, or export the folder.$"):
        low_rank(edited, base, 1, names=LoraNames.of("kohya", parts))
    assert len(low_rank(edited, base, 1, names=LoraNames.of("diffusers", parts))[0]) == 2 * len(names)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (XL, "text_encoder_2.text_projection.weight"),
        (XL, "text_encoder_2.text_model.embeddings.token_embedding.weight"),
        (FLOW, "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo.weight"),  # the T5 of FLUX.1
        (FLOW, "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo.weight"),
    ],
)
def test_what_diffusers_does_not_read_is_refused_by_name(naming: Naming, parts: tuple[str, ...], name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"changes {name}, which LoRA cannot hold .*: use --delta, or export the folder.$"
    ):
        low_rank({name: torch.ones(4, 4)}, {name: torch.zeros(4, 4)}, 1, names=LoraNames.of(naming, parts))


def test_names_of_stable_diffusion_xl_number_the_text_encoders() -> None:
    kohya, own = LoraNames.of("kohya", XL), LoraNames.of("diffusers", XL)
    assert kohya.layer(TEXT) == "lora_te1_text_model_encoder_layers_1_mlp_fc2"
    assert kohya.layer(f"{CLIP_2}.mlp.fc2.weight") == "lora_te2_text_model_encoder_layers_3_mlp_fc2"
    assert kohya.layer(LINEAR) == STABLE_DIFFUSION.layer(LINEAR)
    assert own.layer(TEXT) == "text_encoder.text_model.encoder.layers.1.mlp.fc2"
    assert own.layer(f"{CLIP_2}.mlp.fc2.weight") == f"{CLIP_2}.mlp.fc2"
    assert own.layer(LINEAR) + ".weight" == LINEAR


def test_each_text_encoder_has_its_own_layer_by_which_diffusers_knows_it() -> None:
    names = [f"{CLIP_2}.self_attn.k_proj.weight", TEXT]
    edited, base = ({name: fill(4, 4) for name in names} for fill in (torch.ones, torch.zeros))
    kohya = LoraNames.of("kohya", XL)
    factors, _ = low_rank(edited, base, 1, names=kohya)
    layers = [*names, f"{CLIP_2}.self_attn.out_proj.weight"]
    assert {name.partition(".")[0] for name in factors} == {kohya.layer(name) for name in layers}
    assert not factors[f"{kohya.layer(layers[-1])}.lora_up.weight"].any()


def test_diffusers_own_names(base: dict[str, Tensor]) -> None:
    edited = changed(base, {LINEAR: 1, TEXT: 1, CONVOLUTION: 1})
    factors, report = low_rank(edited, base, 1, names=LoraNames.of("diffusers", ("unet", "text_encoder")))
    text = "text_encoder.text_model.encoder.layers.1.mlp.fc2.lora_linear_layer"
    denoiser = [f"{name.removesuffix('.weight')}.lora_{side}" for name in (LINEAR, CONVOLUTION) for side in "AB"]
    assert set(factors) == {f"{name}.weight" for name in (f"{text}.down", f"{text}.up", *denoiser)}
    assert report["names"] == "diffusers"
    kohya, _ = low_rank(edited, base, 1)
    own = {fingerprint({"": value}) for value in factors.values()}
    assert own == {fingerprint({"": value}) for name, value in kohya.items() if not name.endswith(".alpha")}


def test_an_unchanged_layer_has_no_residual(base: dict[str, Tensor]) -> None:
    factors, report = low_rank({LINEAR: base[LINEAR]}, base, None)
    assert (report["rank"], report["residual"]) == (1, {LINEAR: 0.0})
    assert not any(value.any() for name, value in factors.items() if "alpha" not in name)


def test_ranks() -> None:
    assert (parse_rank("auto"), parse_rank("8")) == (None, 8)
    for text in ("0", "-1", "1.5", "", "all", "9" * 5000):
        with pytest.raises(ValueError, match="must be a rank of at least 1, exact, or auto"):
            parse_rank(text)
