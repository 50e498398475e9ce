"""Edits of text encoders in the newer families: which layers, how they are solved, and what moves in pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_families import build_flux, build_pixart
from torch import Tensor
from torch.testing import assert_close

from helpers import CONFIGS, PROMPTS, QUIET, SHARED, TARGETS, by_least_squares, by_null_space, hook
from lit_unlearn.core.alignment import align_tokens
from lit_unlearn.diffusion.families import Flux
from lit_unlearn.diffusion.hooks import capture_inputs, replace_output
from lit_unlearn.emoji.text_encoder import MAX_LENGTH
from lit_unlearn.methods.memit import MEMIT
from lit_unlearn.methods.value_refinement import ValueRefinement
from lit_unlearn.training import cli as training

pytestmark = pytest.mark.filterwarnings("ignore:edited_parameters='text-fc2' leaves out:UserWarning")

Fit = Callable[..., L.Trainer]
Edit = Callable[..., Any]
KEPT = ["a cat", "the cat in the rain"]
SHORT = 28
"""Positions of the T5 here: the keys of the two retained prompts then leave a null space of its 96 inputs."""
CLIP_1, CLIP_2 = "text_encoder.text_model.encoder.layers", "text_encoder_2.text_model.encoder.layers"
LAST = {
    # The last of the three layers of text_encoder is dead.
    "sdxl": ["text_encoder.encoder.layers.1.mlp.fc2", f"{CLIP_2}.2.mlp.fc2", f"{CLIP_2}.3.mlp.fc2"],
    "sd3": [
        *(f"{CLIP_1}.1.mlp.fc2", f"{CLIP_1}.2.mlp.fc2", f"{CLIP_2}.2.mlp.fc2", f"{CLIP_2}.3.mlp.fc2"),
        "text_encoder_3.encoder.block.1.layer.1.DenseReluDense.wo",
    ],
    "flux": ["text_encoder.encoder.layers.2.mlp.fc2", "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wo"],
    "pixart": ["text_encoder.encoder.block.1.layer.1.DenseReluDense.wo"],
}
"""The last layers that the states are read after, and the ones behind them that act on the pooled vector."""


def with_short_t5(folder: Path, tokenizer: str) -> Path:
    """Let the T5 in ``folder`` read ``SHORT`` positions."""
    file = folder / tokenizer / "tokenizer_config.json"
    changed = {**json.loads(file.read_text(encoding="utf-8")), "model_max_length": SHORT}
    file.write_text(json.dumps(changed), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tiny_sdxl: Path, tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family; not to be written to."""
    copied = tmp_path_factory.mktemp("models") / "sd3"
    shutil.copytree(tiny_sd3, copied)
    flux = build_flux(tmp_path_factory.mktemp("models") / "flux", guidance_embeds=True)
    found = {"sdxl": tiny_sdxl, "sd3": with_short_t5(copied, "tokenizer_3"), "flux": with_short_t5(flux, "tokenizer_2")}
    found["pixart"] = build_pixart(tmp_path_factory.mktemp("models") / "pixart", alpha=True)
    SHARED.update(map(str, found.values()))
    return found


@pytest.fixture
def edit(folders: dict[str, Path], pets: str) -> Edit:
    """Makes an edit of the dog in a tiny model, by default of the last layers; takes the arguments that differ."""

    def build(family: str, kind: type[ValueRefinement] = ValueRefinement, **arguments: Any) -> ValueRefinement:
        defaults = {"concept": "dog", "model": str(folders[family]), "concept_set": pets, "num_inference_steps": 1}
        defaults |= {
            "retain_empty": False,
            "first_layer": -1,
            "values": "residual",
            "optimizer": partial(torch.optim.Adam, lr=0.01),
        }
        module = kind(**{**defaults, **arguments})
        module.configure_model()
        if isinstance(module.pipeline, Flux):
            module.pipeline = replace(module.pipeline, sample_size=8)  # by default 128
        return module

    return build


def weights_of(names: list[str]) -> list[str]:
    return [f"{name}.weight" for name in names]


@torch.no_grad()
def drawn(module: ValueRefinement, prompts: list[str]) -> Tensor:
    """Pictures without guidance, so that they depend on no other prompt."""
    return module.pipeline.draw(prompts, [1, 2], 2, 1.0)


def moved(module: ValueRefinement, prompts: list[str]) -> float:
    """The largest difference of the pictures of ``prompts`` from those of the unedited model."""
    with module.pretrained.restored():
        before = drawn(module, prompts)
    return float((drawn(module, prompts) - before).abs().max())


# --- which layers


@pytest.mark.parametrize("family", LAST)
def test_the_default_is_the_last_layer_of_every_encoder_that_is_read(family: str, edit: Edit) -> None:
    assert edit(family).edited_names == weights_of(LAST[family])


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ({"edited_parameters": r"text_encoder_2\..*fc2\.weight"}, LAST["sd3"][2:4]),
        ({"edited_parameters": r"mlp\.fc2\.weight"}, LAST["sd3"][:4]),
        ({"edited_parameters": r"DenseReluDense\.wo"}, LAST["sd3"][4:]),
        ({"last_layer": -1}, [LAST["sd3"][0], LAST["sd3"][2], LAST["sd3"][4]]),  # none of the pooled vector alone
        ({"edited_parameters": r"text_encoder_2.*layers\.3.*fc2\.weight"}, LAST["sd3"][3:4]),
    ],
)
def test_one_encoder_can_be_chosen(arguments: dict[str, Any], chosen: list[str], edit: Edit, fit: Fit) -> None:
    module = edit("sd3", **arguments)
    assert module.edited_names == weights_of(chosen)
    fit(module, by_null_space(threshold=1e-9, rule="max", ridge=1e-3), steps=1)
    assert moved(module, PROMPTS) > 1e-2


@pytest.mark.parametrize(
    ("family", "arguments", "problem"),
    [
        ("sdxl", {"edited_parameters": r"text_encoder\..*layers\.2\.mlp\.fc2"}, "which the model does not read"),
        ("sdxl", {"first_layer": 2}, r"leave no layer of text_encoder to edit: .* selects the layers 0 to 1"),
        ("sd3", {"first_layer": 2}, r"leave no layer of text_encoder_3 to edit: .* selects the layers 0 to 1"),
        (
            "sd3",
            {"positions": "content"},
            r"positions='content' edits nothing in text_encoder\..*layers\.2.*last_layer",
        ),
        ("sd3", {"edited_parameters": "text-fc1"}, "not added to the residual stream.*choose text-fc2"),
        ("sd3", {"edited_parameters": "text_encoder_3.*(wo|shared)"}, "only weights of text layers"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    family: str, arguments: dict[str, Any], problem: str, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=problem):
        edit(family, **arguments)


def test_without_a_t5_none_can_be_edited(edit: Edit, tiny_sd3_without_t5: Path) -> None:
    assert edit("sd3", model=str(tiny_sd3_without_t5)).edited_names == weights_of(LAST["sd3"][:4])
    with pytest.raises(ValueError, match=r"names text_encoder_3, which .* does not have"):
        edit("sd3", model=str(tiny_sd3_without_t5), edited_parameters=r"text_encoder_3\..*wo")


# --- pictures


@pytest.mark.parametrize("family", LAST)
def test_the_null_space_keeps_pictures_and_moves_the_concepts(family: str, edit: Edit, fit: Fit) -> None:
    module = edit(family)
    fit(module, by_null_space(threshold=1e-9, rule="max", ridge=1e-3), steps=1)
    for name in module.edited_names:  # the retained keys leave something free, so that the edit is not zero
        moment = module.retained[name].moment
        assert torch.linalg.matrix_rank(moment) < len(moment)
    assert moved(module, KEPT) < 1e-4
    assert moved(module, PROMPTS) > 1e-2

    free = edit(family)
    fit(free, by_null_space(threshold=1e6, rule="mean", ridge=1e-3), steps=1)  # P is the identity
    assert moved(free, KEPT) > 1e-3


@pytest.mark.parametrize("retain_empty", [None, True, False])
def test_padding_that_nothing_reads_has_no_keys(retain_empty: bool | None, edit: Edit, fit: Fit) -> None:
    module = edit("pixart", retain_empty=retain_empty)
    fit(module, by_null_space(threshold=1e-9, rule="max", ridge=1e-3), steps=1)
    (name,), (pairs,) = module.edited_names, module.paired.by_part.values()
    text = module.pipeline.texts[0]
    edited, kept = (
        [len(ids) for ids in text.tokenizer(prompts).input_ids]  # with the end of the text
        for prompts in (PROMPTS, KEPT)
    )
    assert pairs.mask.sum(1).tolist() == edited and max(edited) < 20 < text.length
    # The empty prompt has one position that is read; it weighs as much as all retained prompts together.
    assert module.retained[name].count == sum(kept) + (0 if retain_empty is False else len(KEPT))


# --- values


@torch.no_grad()
def inputs_of(module: ValueRefinement, name: str, prompts: list[str]) -> Tensor:
    """Inputs (n, L, d_in), float64, of the layer ``name``."""
    number = [text.part for text in module.pipeline.texts].index(name.split(".")[0])
    with capture_inputs({name: module.layers[name]}) as found:
        module.pipeline.texts[number].model(module.pipeline.tokenize(prompts).ids[number])
    return found[name].double()


def end_of(module: ValueRefinement, prompts: list[str]) -> list[int]:
    """Where each prompt ends for a CLIP: BOS and its tokens come before."""
    return [1 + len(ids) for ids in module.pipeline.tokenizer_2(prompts, add_special_tokens=False).input_ids]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layer", "only_end"), [(LAST["sd3"][2], False), (LAST["sd3"][3], True), (LAST["sd3"][4], False)]
)
@pytest.mark.parametrize("retain_empty", [True, False])
def test_direct_values_follow_the_papers_formula(
    layer: str, only_end: bool, retain_empty: bool, edit: Edit, fit: Fit
) -> None:
    name, ridge = f"{layer}.weight", 0.1
    module = edit(
        "sd3", values="target", edited_parameters=f"{layer.replace('.', '[.]')}.weight", retain_empty=retain_empty
    )
    assert module.edited_names == [name]
    number = int(name.split(".")[0][-1]) - 1
    text = module.pipeline.texts[number]
    ids = [module.pipeline.tokenize(prompts).ids[number].tolist() for prompts in (PROMPTS, TARGETS)]
    rows = [align_tokens(e, t, text.eos, begins=number < 2) for e, t in zip(*ids, strict=True)]
    edited, targets, kept, empty = (inputs_of(module, name, prompts) for prompts in (PROMPTS, TARGETS, KEPT, [""]))
    goals = torch.stack([target[own] for target, own in zip(targets, rows, strict=True)])
    if only_end:  # the pooled vector is a projection of this one state, which counts as a text's 32 positions do
        places = {2: end_of(module, PROMPTS), 3: end_of(module, KEPT)}
        edited, goals = (
            torch.stack([own[place] for own, place in zip(found, places[2], strict=True)]) for found in (edited, goals)
        )
        kept = torch.stack([own[place] for own, place in zip(kept, places[3], strict=True)])
        edited, goals, kept, empty = (found.repeat(MAX_LENGTH, 1) for found in (edited, goals, kept, empty[:, 1]))
    weight = module.layers[name].weight.detach().double().clone()
    # From here on as in the paper: columns are tokens.
    K0, K1 = kept.flatten(0, -2).mT, edited.flatten(0, -2).mT
    if retain_empty:  # as often as all retained prompts together
        K0 = torch.cat([K0, len(KEPT) ** 0.5 * empty.flatten(0, -2).mT], dim=1)
    R = weight @ (goals.flatten(0, -2).mT - K1)
    values, vectors = torch.linalg.eigh(K0 @ K0.mT)
    U = vectors[:, values < 1e-9 * values[-1]]
    P = U @ U.mT
    delta = R @ K1.mT @ P @ torch.linalg.inv(K1 @ K1.mT @ P + ridge * torch.eye(len(P)).double())
    fit(module, by_null_space(threshold=1e-9, rule="max", ridge=ridge), steps=1)
    found = module.layers[name].weight.detach().double() - weight
    # Keys and weights are float32, and the system's condition is about 1e5.
    assert (found - delta).norm() < 1e-3 * delta.norm()
    assert delta.norm() > 1e-2 * weight.norm()


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_residual_values_reach_what_is_read_for_the_target_prompts(family: str, edit: Edit, fit: Fit) -> None:
    module = edit(family)
    fit(module, hardly())
    for name in module.edited_names:
        stretch, pairs = module.stretch_of(name), module.paired.by_part[name.split(".")[0]]
        state = module.layer_state(name)
        with torch.no_grad():
            target_states, target_pooled = pairs.text.read(pairs.target_ids)
            start = module.start_values(state)
            with replace_output(state.layer, start, torch.ones_like(state.mask)):
                states, pooled = pairs.text.read(pairs.edit_ids)
        if stretch.only_end:
            # The states before it are still those of the dog; at the end of the text it makes up for all of them.
            assert_close(pooled, target_pooled, rtol=0, atol=1e-4)
        else:
            assert_close(states, pairs.align(target_states), rtol=0, atol=1e-4)


def hardly() -> L.Callback:
    """Writes next to nothing."""
    return by_null_space(threshold=1e6, rule="mean", ridge=1e12)


def test_only_a_t5_s_states_all_carry_the_concept(edit: Edit, fit: Fit) -> None:
    module = edit("sd3")
    fit(module, hardly())
    carrying = {part: pairs.carrying() for part, pairs in module.paired.by_part.items()}
    assert carrying["text_encoder_2"][0].tolist() == [
        False,
        False,
        *[True] * (MAX_LENGTH - 2),
    ]  # BOS and "a" come before the dog
    assert carrying["text_encoder_3"].all()


SLOW = [("sdxl", ValueRefinement), ("sd3", MEMIT), ("flux", MEMIT), ("pixart", MEMIT)]


def same_noise(module: ValueRefinement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare predictions at the same noise and timesteps in all steps."""
    drawn_noise = module.noise
    monkeypatch.setattr(module, "noise", lambda batch, _: drawn_noise(batch, 0))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sdxl", MEMIT),
        ("sd3", ValueRefinement),
        ("flux", ValueRefinement),
        ("pixart", ValueRefinement),
        *(pytest.param(*slow, marks=pytest.mark.slow) for slow in SLOW),
    ],
)
def test_the_descent_lowers_its_loss_in_every_layer(
    family: str, kind: Any, edit: Edit, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = edit(family, kind, values="refined", start="output")
    same_noise(module, monkeypatch)
    fit(module, by_null_space(threshold=1e-9, rule="max", ridge=1e-3), steps=4)
    for name in module.edited_names:
        errors = module.report["layers"][name]
        assert errors["last_error"] < errors["first_error"], name
    assert module.forwards.count > 0
    assert moved(module, KEPT) < 1e-4


@pytest.mark.parametrize("family", LAST)
def test_memit_reaches_the_goal_of_each_stretch(family: str, edit: Edit, fit: Fit) -> None:
    module = edit(family, MEMIT, first_layer=0)
    assert module.fit_plan.epochs == {"sdxl": 3, "sd3": 5, "flux": 2, "pixart": 1}[family]
    goals = {}
    keep = hook("on_train_start", lambda *_: goals.update({own: module.target_stream(own) for own in module.stretches}))
    with torch.no_grad():
        fit(module, keep, by_least_squares(ridge=1e-6, retain_weight=0.0), steps=1)
        for stretch, goal in goals.items():
            pairs = module.paired.by_part[stretch.part]
            state = module.layer_state(stretch.names[-1])
            found, after = state.stream, module.stream_after(stretch)
            with module.pretrained.restored():
                before = pairs.text.stream(pairs.edit_ids, after)
            missing = [(goal - states)[state.mask].norm() for states in (found, before)]
            assert missing[0] < 0.1 * missing[1], stretch


# --- from the command line


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("sd3", "null_space"),
        pytest.param("pixart", "null_space", marks=pytest.mark.slow),
        pytest.param("sdxl", "null_space", marks=pytest.mark.slow),
        pytest.param("flux", "null_space", marks=pytest.mark.slow),
        pytest.param("sd3", "memit", marks=pytest.mark.slow),
        pytest.param("sdxl", "null_space_refined", marks=pytest.mark.slow),
    ],
)
def test_recipes_run_on_a_folder(
    family: str, recipe: str, folders: dict[str, Path], pets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--model.init_args.model", str(folders[family])]
    options += ["--model.init_args.concept_set", pets, *QUIET]
    cli = training.run(["fit", *options])
    module = cli.model
    assert set(module.report["layers"]) == set(module.edited_names)
    assert all(0 < ratio < 20 for ratio in module.pretrained.change_ratios().values())
