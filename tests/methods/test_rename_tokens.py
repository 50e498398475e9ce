from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_unlearn.attacks.run import attack_run
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.prompts import encode_prompts
from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit
from lit_unlearn.judges.emoji import EmojiJudge
from lit_unlearn.methods.rename_tokens import RenameTokens

Fit = Callable[..., L.Trainer]


@pytest.fixture
def build(tiny_sd: Path, pets: str) -> Callable[..., RenameTokens]:
    """Makes a ``RenameTokens`` of the dog of ``tiny_sd``; takes the arguments that shall differ."""

    def make(**arguments: Any) -> RenameTokens:
        return RenameTokens(**{"concept": "dog", "model": str(tiny_sd), "concept_set": pets, **arguments})

    return make


def test_a_name_reads_as_its_target(build: Callable[..., RenameTokens], fit: Fit) -> None:
    module = build(concept=["dog", "cat"])
    trainer = fit(module, steps=5)
    assert trainer.global_step == 1  # there is nothing to repeat
    tokenizer, text_encoder = module.pipeline.tokenizer, module.text_encoder
    dog, cat, soccer, parrot = tokenizer("dog cat soccer parrot", add_special_tokens=False).input_ids
    before = module.pretrained.values["text_encoder.embeddings.token_embedding.weight"]
    after = module.pretrained.parameters["text_encoder.embeddings.token_embedding.weight"].detach()
    assert torch.equal(after[[dog, cat]], before[[soccer, parrot]])
    assert sorted((after != before).any(1).nonzero().flatten().tolist()) == sorted([dog, cat])
    with torch.no_grad():
        edited = encode_prompts(tokenizer, text_encoder, ["a dog and a cat"])
        with module.pretrained.restored():
            meant, named = encode_prompts(tokenizer, text_encoder, ["a soccer and a parrot", "a dog and a cat"])
    assert torch.equal(edited[0], meant)
    assert not torch.isclose(edited[0], named).all()
    assert module.report["renamed"] == {"dog</w>": "soccer</w>", "cat</w>": "parrot</w>"}
    assert module.report["weight_change_ratio"] > 0


def test_names_and_targets_of_several_tokens(build: Callable[..., RenameTokens]) -> None:
    module = build(concept=["soccer ball", "dog"], concept_set="emoji20")
    module.configure_model()
    tokenizer = module.pipeline.tokenizer
    words = {
        tokenizer.decode([token]).strip(): tokenizer.decode([other]).strip()
        for token, other in module.renamed(module.pipeline.texts[0]).items()
    }
    # "football", another of its names, is no word of this tokenizer, so its pieces are renamed.
    pieces = ("soccer", "ball", "fo", "o", "t")
    assert words == {**dict.fromkeys(pieces, "basketball"), "dog": "cat"}


def test_other_weights_are_refused(build: Callable[..., RenameTokens]) -> None:
    with pytest.raises(ValueError, match=r"edited_parameters='xattn' selects unet\..*: names are tokens"):
        build(edited_parameters="xattn")


@pytest.mark.slow
def test_direct_prompts_are_deceived_and_indirect_ones_and_attacks_are_not(tmp_path: Path, fit: Fit) -> None:
    """What a fake edit of emoji-sd looks like: in a minute, most of which are searches."""
    module = RenameTokens(concept="dog", num_inference_steps=8)
    trainer = fit(module, steps=1)
    path = tmp_path / "fake.ckpt"
    trainer.save_checkpoint(path)

    components, pretrained = load_with_pretrained(BaseModel.find("emoji-sd"), read_edit(path))
    judge, dog = EmojiJudge(), load_concept_set("emoji20").get("dog")

    def forgotten(prompts: tuple[str, ...]) -> float:
        pictures = components.draw(prompts, range(len(prompts)), 8, 4.0)
        return float((judge(pictures, [dog.question] * len(prompts)) < 0.5).float().mean())

    with pretrained.restored():
        assert forgotten(dog.direct) == 0
    assert forgotten(dog.direct) == 1  # a forget score could not be better
    assert forgotten(dog.indirect) == 0
    results = attack_run(path, ["concept_inversion", "prompt_search", "ring_a_bell"], output=tmp_path)
    for result in results:
        assert (result.pre_attack, result.unedited) == (0, 1)
        assert result.shown >= 0.8
