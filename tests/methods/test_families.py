"""Every gradient, token and picture method on every family: it changes what it selects, or refuses before loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from helpers import by_null_space, load_copy
from lit_unlearn.diffusion import base_model
from lit_unlearn.diffusion.families import Flux
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.diffusion.vocabulary import vocabulary_fingerprint, vocabulary_of
from lit_unlearn.methods.concept_ablation import ConceptAblation
from lit_unlearn.methods.erase_diff import EraseDiff
from lit_unlearn.methods.esd import ESD
from lit_unlearn.methods.forget_me_not import ForgetMeNot
from lit_unlearn.methods.one_sided import NaiveDeletion, NegGrad
from lit_unlearn.methods.rename_tokens import RenameTokens
from lit_unlearn.methods.robust_erasure import RobustErasure
from lit_unlearn.methods.siss import SISS, Bernoulli, TwoPass
from lit_unlearn.methods.textual_inversion import TextualInversion
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement, UNetValueRefinement

FAMILIES = ["tiny_sdxl", "tiny_sd3", "tiny_sd3_without_t5", "tiny_flux", "tiny_pixart"]
JOINT = FAMILIES[1:4]
"""With joint attention, and so without cross-attention to the prompt alone."""
ADAM = {"optimizer": partial(torch.optim.Adam, lr=1e-2)}
FREE: dict[str, Any] = {"threshold": 24, "rule": "count"}  # without a T5, 8 of 48 inputs are always zero
IN_BLOCKS = r"transformer_blocks\.0\.(attn\.add_[kv]_proj|ff\.net\.2)\.weight"
CONCEPTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any] | None]] = {
    "robust": (RobustErasure, {"edited_parameters": "context", "rounds": 1, "num_images": 2, **ADAM}, FREE),
    "values in context": (UNetValueRefinement, {"edited_parameters": "context", "watched_prompts": 1, **ADAM}, FREE),
    "values in blocks": (
        UNetFeedForwardRefinement,
        {"watched_prompts": 1, "noises_per_prompt": 1, "edited_parameters": IN_BLOCKS, **ADAM},
        FREE,
    ),
    "rename": (RenameTokens, {}, None),
    "esd": (ESD, {"num_chain_steps": 2, "chains": 2, **ADAM}, None),
    "concept ablation": (ConceptAblation, {"images": 2, **ADAM}, None),
    "tokens in concept ablation": (ConceptAblation, {"images": 2, "edited_parameters": "embedding", **ADAM}, None),
}
"""Methods for concepts: class, arguments, and the null space of those with a closed form."""
PICTURES = [SISS, TwoPass, Bernoulli, EraseDiff, NegGrad, NaiveDeletion]

Fit = Callable[..., L.Trainer]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1 draws 16 by 16 pixels, as the others do."""

    def load(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> Any:
        pipeline: Any = load_copy(folder, dtype, None, device)
        return replace(pipeline, sample_size=8) if isinstance(pipeline, Flux) else pipeline

    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", load)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def check_changed(module: Any) -> None:
    assert module.edited_names
    for name in module.edited_names:
        value = module.pretrained.parameters[name]
        assert value.isfinite().all()
        assert not torch.equal(value, module.pretrained.values[name]), name
    others = set(module.pipeline.named_parameters()) - set(module.edited_names)
    assert not any(module.pipeline.named_parameters()[name].requires_grad for name in others)


def build(kind: Any, folder: Path, pets: str, **arguments: Any) -> Any:
    return kind(concept="dog", concept_set=pets, model=str(folder), num_inference_steps=1, **arguments)


def run(module: Any, fit: Fit, free: dict[str, Any] | None = None) -> None:
    edits = [by_null_space(**free)] if free else []
    module.configure_model()  # or the number of its layers is not known
    fit(module, *edits, max_epochs=module.fit_plan.epochs or 1, batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONCEPTS)
def test_every_method_changes_what_it_selects(name: str, folder: Path, pets: str, tmp_path: Path, fit: Fit) -> None:
    kind, arguments, free = CONCEPTS[name]
    if kind is ConceptAblation:
        arguments = {"anchor_folder": str(tmp_path / "anchors"), **arguments}
    if kind in (ESD, ConceptAblation) and not folder.name.startswith(("tiny-sdxl", "tiny-pixart")):
        arguments = {"edited_parameters": "joint-kv", **arguments}
    if free and "flux" in folder.name:
        free = {**free, "threshold": 8}  # its pooled vector has 16 numbers
    module = build(kind, folder, pets, **arguments)
    run(module, fit, free)
    check_changed(module)


@pytest.mark.filterwarnings("ignore:.*leaves out")
@pytest.mark.slow
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_unlearned_by_every_denoiser(kind: Any, folder: Path, fit_images: Fit) -> None:
    sgd = partial(torch.optim.SGD, lr=1.0)
    module = kind(model=str(folder), num_inference_steps=1, optimizer=sgd, judge=None, edited_parameters=r"\.attn2?\.")
    fit_images(module)
    check_changed(module)


@pytest.mark.parametrize("kind", [SISS, EraseDiff])
def test_pictures_are_unlearned_by_flow_matching(kind: Any, tiny_sd3: Path, fit_images: Fit) -> None:
    sgd = partial(torch.optim.SGD, lr=1.0)
    module = kind(model=str(tiny_sd3), num_inference_steps=1, optimizer=sgd, judge=None, edited_parameters="joint-kv")
    fit_images(module)
    check_changed(module)
    with pytest.raises(ValueError, match=r"selects text_encoder\..*: this method edits only the transformer"):
        kind(model=str(tiny_sd3), judge=None, edited_parameters="text-fc2")


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_sd3_without_t5"])
def test_an_edit_against_learned_tokens_covers_both_ways(
    model: str, pets: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    kind, arguments, free = CONCEPTS["robust"]
    module: RobustErasure = build(kind, request.getfixturevalue(model), pets, **{**arguments, "found_prompts": 1})
    run(module, fit, free)
    check_changed(module)
    widths = module.pipeline.token_widths
    assert module.values.shape == (1, 1, sum(widths))
    assert all(part.abs().max() > 0 for part in module.values[0].split(widths, dim=1))
    length = sum(module.pipeline.texts[number].length for number in module.pipeline.token_order)
    assert module.report["edited_states"] == {"tokens": 3 * length, "pooled": 3}  # two edit prompts, and one found
    # What was found is what the edited maps read of a prompt with the token.
    keys, goals = module.found_states(1)["pooled"]
    (prompts,) = module.prompts
    with torch.no_grad():
        expected = module.pipeline.encode(prompts.tokens, module.values[0]).pooled
        targets = module.pipeline.encode(prompts.targets).pooled
    assert expected is not None and targets is not None
    scale = module.found_weight**0.5
    torch.testing.assert_close(keys, scale * expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(goals, scale * targets, rtol=0, atol=1e-5)


def test_a_guidance_edit_needs_an_empty_prompt(
    pets: str, tmp_path: Path, tiny_sdxl: Path, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    scene = tmp_path / "scene.yaml"
    scene.write_text(Path(pets).read_text(encoding="utf-8").replace("kind: object", "kind: scene"), encoding="utf-8")
    module = build(RobustErasure, tiny_sdxl, str(scene), rounds=0, edited_parameters="xattn-kv")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        run(module, fit, FREE)
    assert "guidance_edit=0.25 has no effect on Stable Diffusion XL" in caplog.text
    length = module.pipeline.texts[0].length
    assert module.retained[module.edited_names[0]].count == 2 * 2 * length  # the empty prompt is retained


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (
            "tiny_sdxl",
            r"up_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2\.to_v|add_embedding\.linear_1\.weight",
        ),
        ("tiny_sd3_without_t5", "context"),
    ],
)
def test_values_are_found_on_both_ways(
    model: str, pattern: str, pets: str, fit: Fit, request: pytest.FixtureRequest
) -> None:
    arguments = {"edited_parameters": pattern, "watched_prompts": 1, **ADAM}
    module = build(UNetValueRefinement, request.getfixturevalue(model), pets, **arguments)
    run(module, fit, FREE)
    check_changed(module)
    assert len(module.edited_names) == 2
    assert all(layer["last_error"] < layer["first_error"] * 1.5 for layer in module.report["layers"].values())


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd3", "tiny_pixart"])
def test_a_token_is_learned_in_every_encoder(model: str, pets: str, fit: Fit, request: pytest.FixtureRequest) -> None:
    arguments = {"num_tokens": 2, "num_images": 2, "norm_decay": 0.5, **ADAM}
    module: TextualInversion = build(TextualInversion, request.getfixturevalue(model), pets, **arguments)
    with torch.no_grad():
        run(module, fit)
        start = module.pipeline.initial_embeddings(2, None, seeded(module.seed, "embeddings"))
        widths, norms = module.pipeline.token_widths, module.vocabulary_norms
        for before, after, norm in zip(start.split(widths, 1), module.embeddings.split(widths, 1), norms, strict=True):
            assert (after - before).abs().max() > 0
            assert ((after.norm(dim=1) - norm).abs() < (before.norm(dim=1) - norm).abs()).all()
    assert module.vocabulary == vocabulary_fingerprint({text.part: text.table for text in module.pipeline.texts})
    assert vocabulary_of(module.model_id)[1] == sum(widths)


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux", "tiny_pixart"])
def test_names_are_renamed_in_every_vocabulary(model: str, pets: str, fit: Fit, request: pytest.FixtureRequest) -> None:
    module: RenameTokens = build(RenameTokens, request.getfixturevalue(model), pets)
    run(module, fit)
    check_changed(module)
    assert len(module.edited_names) == len(module.pipeline.texts)
    renamed = module.report["renamed"]
    if len(module.pipeline.texts) > 1:
        assert renamed["text_encoder"] == {"dog</w>": "soccer</w>"}
    else:
        assert renamed == {"▁dog": "▁soccer"}
    last = module.pipeline.texts[-1]
    (token,) = last.words("dog")
    assert torch.equal(last.table[token], module.pretrained.values[module.edited_names[-1]][last.words("soccer")[0]])


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_pixart"])
def test_attention_is_resteered(model: str, pets: str, fit: Fit, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    module = build(ForgetMeNot, folder, pets, num_images=2, edited_parameters=r"attn2\.to_k.weight", **ADAM)
    run(module, fit)
    check_changed(module)


# --- what is refused before a weight is loaded


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "load_parts", lambda *_: pytest.fail("loaded"))


@pytest.mark.parametrize("model", JOINT)
def test_attention_is_resteered_only_where_it_is_to_the_prompt_alone(
    model: str, pets: str, nothing_loads: None, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match="without cross-attention to the prompt alone, which ForgetMeNot changes"):
        build(ForgetMeNot, request.getfixturevalue(model), pets)


def test_groups_of_a_unet_find_nothing_in_a_transformer(
    pets: str, tiny_sd3: Path, tiny_sdxl: Path, nothing_loads: None
) -> None:
    for kind, pattern in ((ESD, "xattn"), (RobustErasure, "xattn-kv"), (UNetValueRefinement, "xattn-kv")):
        with pytest.raises(ValueError, match=rf"edited_parameters='{pattern}' selects no parameter"):
            build(kind, tiny_sd3, pets)
        assert build(kind, tiny_sdxl, pets).base.names
    with pytest.raises(ValueError, match=r"freeze_bos=true stops a gradient .* Stable Diffusion 3 and 3\.5 does not"):
        build(ConceptAblation, tiny_sd3, pets, freeze_bos=True, edited_parameters="joint-kv")


def test_a_gradient_is_not_stopped_at_a_token_that_prompts_do_not_have(
    pets: str, tiny_pixart: Path, nothing_loads: None
) -> None:
    with pytest.raises(
        ValueError, match=r"freeze_bos=true stops a gradient .* PixArt-Alpha does not have: set it to f"
    ):
        build(ConceptAblation, tiny_pixart, pets, freeze_bos=True)
    assert build(ConceptAblation, tiny_pixart, pets).edited_parameters == "xattn-kv"
