from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lit_unlearn.callbacks.embeddings import FILE, SaveEmbeddings
from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.new_tokens import read_embeddings
from lit_unlearn.diffusion.vocabulary import vocabulary_of
from lit_unlearn.edits.checkpoint import load_edited, read_edit
from lit_unlearn.methods.forget_me_not import ForgetMeNot
from lit_unlearn.methods.textual_inversion import TextualInversion


def arguments(model: Path, pets: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "concept": "dog",
        "model": str(model),
        "concept_set": pets,
        "num_inference_steps": 1,
        "num_images": 1,
        "image_cache": str(tmp_path / "references"),
    }


def test_learned_tokens_are_saved_and_read_by_forget_me_not(
    trainer_with: Any, tiny_sd: Path, pets: str, tmp_path: Path
) -> None:
    shared = arguments(tiny_sd, pets, tmp_path)
    module = TextualInversion(num_tokens=3, templates=["a {}"], **shared)
    trainer = trainer_with(SaveEmbeddings(), max_epochs=1, limit_val_batches=0)
    trainer.fit(module, ConceptPrompts("dog", pets, steps=2, batch_size=1))
    path = folder_of(trainer) / FILE
    embeddings, metadata = read_embeddings(path)
    assert torch.equal(embeddings, module.embeddings)
    assert (metadata["concept"], metadata["vocabulary"]) == ("dog", vocabulary_of(str(tiny_sd))[0])
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["templates"] == "a {}"
    editor = ForgetMeNot(embeddings=str(path), **shared)
    trainer_with(max_epochs=1, limit_val_batches=0).fit(editor, ConceptPrompts("dog", pets, steps=1, batch_size=1))
    assert editor.report["weight_change_ratio"] > 0


def test_the_run_is_no_edit_of_weights(trainer_with: Any, tiny_sd: Path, pets: str, tmp_path: Path) -> None:
    module = TextualInversion(**arguments(tiny_sd, pets, tmp_path))
    trainer = trainer_with(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, ConceptPrompts("dog", pets, steps=1, batch_size=1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    edit = read_edit(tmp_path / "run.ckpt")
    base = BaseModel.find(str(tiny_sd))
    edit.check_base(base)  # a test of the run asks for that
    with pytest.raises(ValueError, match=r"run.ckpt edits no weight of the model: TextualInversion leaves it as it is"):
        load_edited(base, edit)


def test_other_methods_learn_no_tokens(trainer_with: Any, tiny_sd: Path, pets: str, tmp_path: Path) -> None:
    module = ForgetMeNot(**arguments(tiny_sd, pets, tmp_path))
    with pytest.raises(
        ValueError, match="SaveEmbeddings writes what TextualInversion learns, but the module is Forget"
    ):
        trainer_with(SaveEmbeddings(), max_epochs=1).fit(module, ConceptPrompts("dog", pets, steps=1))
