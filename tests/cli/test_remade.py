"""A run is made again from nothing but the provenance of its export, and finds the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from lit_unlearn import cli
from lit_unlearn.data.concepts import available_concept_sets, load_concept_set
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.edits.export import weights_sha256
from lit_unlearn.system.json_files import write_json

OPTIONS = ["--seed_everything", "3", "--edit.threshold", "0.2", "--data.steps", "3", "--data.batch_size", "1"]
OPTIONS += ["--trainer.accumulate_grad_batches", "2", "--model.positions", "content", "--model.rounds", "2"]


def remake(facts: dict[str, Any], folder: Path, places: dict[str, str]) -> Path:
    """Fit again by what ``facts`` say alone, in ``folder``, and return the checkpoint.

    ``places`` says where this machine has what the facts have a name of only, by argument of the method.
    """
    given = [f"recipe.model.init_args.{name}" for name in places]
    assert [name for name in facts["local_paths"] if name.startswith("recipe.")] == given
    folder.mkdir()
    (folder / "set.yaml").write_text(yaml.safe_dump(facts["concept_set"], sort_keys=False), encoding="utf-8")
    recipe = facts["recipe"]
    recipe["model"]["init_args"] |= {**places, "concept_set": str(folder / "set.yaml")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    root = folder / "logs"
    where = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar"]
    assert cli.main(["fit", "--config", str(folder / "recipe.yaml"), *where, "false"]) == 0
    (found,) = root.rglob("last.ckpt")
    return found


@pytest.mark.parametrize("form", ["folder", "delta"])
def test_provenance_is_all_that_a_run_needs(recipe: Path, workplace: Path, form: str) -> None:
    assert cli.main(["fit", "--config", str(recipe), *OPTIONS]) == 0
    checkpoint = "logs/null_space/dog/version_0/checkpoints/last.ckpt"
    plain = "logs/plain/dog/version_0/checkpoints/last.ckpt"
    assert cli.main(["fit", "--config", str(recipe), "--method", "plain"]) == 0  # the options matter
    if form == "folder":
        assert cli.main(["export", "--ckpt_path", checkpoint, "-o", "out"]) == 0
        facts = json.loads(Path("out/provenance.json").read_text(encoding="utf-8"))
    else:
        assert cli.main(["export", "--ckpt_path", checkpoint, "-o", "out", "--delta"]) == 0
        with safe_open("out/delta.safetensors", framework="pt") as file:
            facts = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
    init_args = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]
    places = {name: init_args[name] for name in ("judge", "model")}
    remade = read_edit(remake(facts, Path("again"), places)).weights
    assert weights_sha256(remade) == weights_sha256(read_edit(checkpoint).weights)
    assert weights_sha256(remade) != weights_sha256(read_edit(plain).weights)


@pytest.mark.parametrize("name", available_concept_sets())
def test_a_set_is_itself_when_it_is_written_and_read_again(name: str, tmp_path: Path) -> None:
    concepts = load_concept_set(name)
    write_json(tmp_path / "facts.json", concepts.content())  # as provenance does
    content = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    again = load_concept_set(tmp_path / "set.yaml")
    assert again.concepts == concepts.concepts
    assert (again.name, again.counts, again.sha256) == (concepts.name, concepts.counts, concepts.sha256)
