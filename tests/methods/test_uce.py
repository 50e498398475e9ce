from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.testing import assert_close

from helpers import states
from lit_unlearn.core.uce import without_component
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.prompts import tokenize
from lit_unlearn.methods.uce import UCE

Fit = Callable[..., L.Trainer]
Build = Callable[..., UCE]
LENGTH = 32
CUT = 3e-6
"""Largest difference of a state from that of the whole window."""


@pytest.fixture
def uce(tiny_sd: Path, pets: str) -> Build:
    """Makes a ``UCE`` that edits the dog out of ``tiny_sd``; takes the arguments that shall differ."""

    def build(**arguments: Any) -> UCE:
        defaults = {"concept": "dog", "model": str(tiny_sd), "concept_set": pets, "num_inference_steps": 1}
        return UCE(**{**defaults, **arguments})

    return build


# --- what is edited into what


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        ({}, [("dog", "soccer ball")]),
        ({"towards": "anchor"}, [("dog", "a toy")]),
        ({"towards": "empty"}, [("dog", "")]),
        ({"towards": "prompt", "guide": " "}, [("dog", " ")]),
        (
            {"prompts": "edit_prompts"},
            [("a dog", "a soccer ball"), ("the dog at sunset", "the soccer ball at sunset")],
        ),
        ({"prompts": "edit_prompts", "towards": "anchor"}, [("a dog", "a toy"), ("the dog at sunset", "a toy")]),
        ({"concept": ["dog", "cat"], "preserve": None}, [("dog", "soccer ball"), ("cat", "parrot")]),
        (
            {"concept": ["dog", "cat"], "preserve": None, "towards": "prompt", "guide": ["a toy", "a bird"]},
            [("dog", "a toy"), ("cat", "a bird")],
        ),
    ],
)
def test_phrases_and_their_guides(arguments: dict[str, Any], pairs: list[tuple[str, str]], uce: Build) -> None:
    module = uce(**arguments)
    (guides,) = module.guides
    assert list(zip(module.phrases, guides, strict=True)) == pairs


def test_all_names_of_a_concept_are_edited_and_expanded_by_kind(uce: Build) -> None:
    module = uce(concept=["soccer ball", "sketch"], concept_set="emoji20", expand=True)
    assert len(module.phrases) == 6 * (3 + 1)  # a name and five templates each
    assert {"soccer ball", "soccer", "football", "a picture of football", "sketch", "a picture in sketch style"} <= set(
        module.phrases
    )
    assert module.guides == [["basketball"] * 18 + ["glossy"] * 6]


@pytest.mark.parametrize(
    ("arguments", "preserved"),
    [
        ({}, ["cat"]),
        ({"prompts": "edit_prompts"}, ["a cat", "the cat in the rain"]),
        ({"preserve": ["a bird", "a cat"]}, ["a bird", "a cat"]),
        ({"preserve": None}, []),
    ],
)
def test_what_is_preserved(arguments: dict[str, Any], preserved: list[str], uce: Build) -> None:
    assert uce(**arguments).preserved == preserved


def test_others_never_name_an_edited_concept(uce: Build, pets: str, tmp_path: Path) -> None:
    content = yaml.safe_load(Path(pets).read_text(encoding="utf-8"))
    content["concepts"]["cat"]["names"] = ["cat", "dog hater", "Dog"]
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert uce(concept_set=str(path)).preserved == ["cat", "dog hater"]  # which is no dog
    prompts = uce(concept="pixel art", concept_set="emoji20", prompts="edit_prompts").preserved
    assert prompts == load_concept_set("emoji20").retain_prompts(["pixel art"])


# --- which states


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
@pytest.mark.parametrize("towards", ["target", "empty"])
def test_the_state_of_the_last_token(model: str, towards: str, uce: Build, fit: Fit, request: Any) -> None:
    module = uce(model=str(request.getfixturevalue(model)), prompts="edit_prompts", towards=towards)
    fit(module)
    # BOS is 0: "a dog" ends at 2, "the dog at sunset" at 4, "a soccer ball" at 3, the empty prompt at BOS.
    ends, guide_ends = (2, 4), {"target": (3, 5), "empty": (0, 0)}[towards]
    pad = int(tokenize(module.pipeline.tokenizer, [""])[0, -1])
    assert (pad == module.pipeline.tokenizer.eos_token_id) is (model == "tiny_sd")
    keys, guides = states(module, *module.phrases).double(), states(module, *module.guides[0]).double()
    found, wished = module.mapped["tokens"], torch.stack([keys[0, ends[0]], keys[1, ends[1]]])
    # The window is cut behind the last token that is read, so float32 states differ by rounding.
    assert_close(found.keys, wished, rtol=0, atol=CUT)
    wished = torch.stack([guides[0, guide_ends[0]], guides[1, guide_ends[1]]])
    assert_close(found.guides[0], wished, rtol=0, atol=CUT)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_the_states_from_the_last_token_on(model: str, uce: Build, fit: Fit, request: Any) -> None:
    module = uce(model=str(request.getfixturevalue(model)), tokens="from_subject")
    fit(module)
    # "dog" ends at 1 and "soccer ball" at 2, so the window of the guide ends one position earlier.
    assert_close(module.mapped["tokens"].keys, states(module, "dog").double()[0, 1 : LENGTH - 1], rtol=0, atol=CUT)
    assert_close(module.mapped["tokens"].guides[0], states(module, "soccer ball").double()[0, 2:], rtol=0, atol=CUT)
    assert module.mapped["tokens"].rows.tolist() == [0] * (LENGTH - 2)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2"])
def test_the_preserved_states(model: str, uce: Build, fit: Fit, request: Any) -> None:
    for tokens in ("last_subject", "all"):
        module = uce(model=str(request.getfixturevalue(model)), preserve=["a cat", "parrot"], preserve_tokens=tokens)
        fit(module)
        found = states(module, "a cat", "parrot", "").double()
        rows = found.flatten(0, 1) if tokens == "all" else torch.stack([found[0, 2], found[1, 1]])
        (retained,) = set(module.retained.values())
        assert retained.moment is not None
        # The empty prompt counts as well, as in the code of 2023, and so it does for the default of preserve_scale.
        assert (retained.count, retained.prompts) == (len(rows), 3 if tokens == "all" else 2)
        assert (retained.keys is not None) is (tokens == "last_subject")  # fewer keys than inputs
        if retained.keys is not None:
            assert_close(retained.keys, rows, rtol=0, atol=CUT)
            rows = retained.keys
        # A sum of up to 96 products in float64.
        assert_close(retained.moment, rows.mT @ rows, rtol=1e-12, atol=1e-12)
        assert retained.largest_norm == pytest.approx(float(rows.norm(dim=1).max()), rel=1e-12)


@pytest.mark.parametrize("preserve", [None, [""]])
def test_all_positions_of_the_empty_prompt_are_preserved_once_even_if_nothing_else_is(
    preserve: list[str] | None, uce: Build, fit: Fit
) -> None:
    """As the script of 2023 does, whose list begins with the empty prompt; the script of 2025 preserves nothing."""
    module = uce(preserve=preserve, preserve_tokens="all")
    fit(module)
    (retained,) = set(module.retained.values())
    rows = states(module, "").double()[0]
    assert (retained.count, retained.prompts) == (LENGTH, 1)  # so that the default of preserve_scale is 1
    assert_close(retained.moment, rows.mT @ rows, rtol=1e-12, atol=1e-12)
    module = uce(preserve=None, preserve_tokens="last_subject")
    fit(module)
    assert {own.moment for own in module.retained.values()} == {None}


def test_targets_are_the_guides_outputs(uce: Build, fit: Fit) -> None:
    module = uce(tokens="from_subject", preserve=None)
    fit(module)
    weight = next(iter(module.pretrained.values.values())).double()
    goal = module.mapped["tokens"].guides[0] @ weight.mT
    assert torch.equal(module.layer_targets(weight, "tokens"), goal)
    module.technique = "tensor"
    assert torch.equal(
        module.layer_targets(weight, "tokens"),
        without_component(goal, module.mapped["tokens"].keys @ weight.mT, module.mapped["tokens"].rows),
    )
    assert (module.layer_targets(weight, "tokens") - goal).norm() > 1e-2 * goal.norm()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preserve": ["a cat", "the Dog barks"]}, r"model.preserve has 'the Dog barks', .*edited concept 'dog'"),
        ({"preserve": "cats"}, "model.preserve='cats' is not a list"),
        ({"concept": ["dog", "cat"]}, "model.preserve='others' finds no prompt besides dog, cat in pets"),
        ({"towards": "prompt"}, "model.guide=null does not fit towards='prompt'"),
        ({"guide": "a toy"}, "model.guide='a toy' needs towards='prompt', not 'target'"),
        ({"towards": "prompt", "guide": "a dog house"}, "model.guide='a dog house' names the edited concept 'dog'"),
        ({"towards": "prompt", "guide": ["a", "b"]}, "model.guide has 2 prompts for 1 concepts"),
        ({"expand": True, "prompts": "edit_prompts"}, "model.expand=true puts names into templates"),
        ({"edited_parameters": "xattn"}, r"edited_parameters='xattn' selects .*attn2.to_out.0.bias: this method"),
        ({"edited_parameters": "text-fc2"}, "edited_parameters='text-fc2' selects text_encoder"),
    ],
)
def test_mistakes_are_found_before_a_weight_is_loaded(
    arguments: dict[str, Any], message: str, uce: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.diffusion.base_model.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        uce(**arguments)
