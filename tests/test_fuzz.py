"""Any bytes at all, as a delta, a checkpoint or a concept set: a valid object, or one sentence."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from lit_unlearn.data.concepts import ConceptSet, load_concept_set
from lit_unlearn.edits.checkpoint import Edit, read_edit

NAME = "text_encoder.encoder.layers.1.mlp.fc2.weight"
FACTS: dict[str, Any] = {
    "method": "ESD",
    "concepts": ["dog"],
    "base_model": "emoji-sd",
    "base_fingerprint": "0" * 64,
    "config": {"dtype": "float32", "num_inference_steps": 4},
}


FUZZ = settings(
    max_examples=100, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
LONG_FUZZ = settings(FUZZ, max_examples=1000)


def delta(facts: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None) -> bytes:
    """An exported delta, byte for byte."""
    metadata = {name: json.dumps(value) for name, value in {**FACTS, **(facts or {})}.items()}
    return save({NAME: torch.ones(2, 3)} if weights is None else weights, metadata)


def check_delta(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before = set(path.parent.iterdir())
    try:
        assert isinstance(read_edit(path), Edit)
    except ValueError as error:
        assert "\n" not in str(error)
    assert set(path.parent.iterdir()) == before


def check_set(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        assert isinstance(load_concept_set(path), ConceptSet)
    except ValueError as error:
        assert "\n" not in str(error)


def mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    """``valid`` with some bytes replaced, inserted or left out."""

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        content = valid
        for place, length, new in changes:
            start = place % (len(content) + 1)
            content = content[:start] + new + content[start + length :]
        return content

    change = st.tuples(st.integers(0, len(valid)), st.integers(0, 20), st.binary(max_size=20))
    return st.lists(change, min_size=1, max_size=4).map(apply)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
HOSTILE_FACTS = st.dictionaries(st.sampled_from([*FACTS, "base_sha256", "concept_set_sha256"]), JSON, max_size=3)
DELTAS = st.binary(max_size=300) | mutated(delta()) | HOSTILE_FACTS.map(delta)
PETS_YAML = b"""name: pets
prompts_per_concept: {direct: 1, indirect: 1, edit: 1}
concepts:
  dog:
    kind: object
    target: ball
    anchor: a toy
    question: Is there a dog?
    direct: [one dog]
    indirect: [a pet that barks]
    edit_prompts: [a dog]
    target_prompts: [a ball]
"""
FRAGMENTS = [
    *(
        b"!!python/name:os.system ",
        b"!!binary x",
        b"!!set ",
        b"&a ",
        b"*a",
        b"<<: ",
        b"%YAML 9.9\n",
        b"---\n",
        b"...\n",
    ),
    *(
        b"? ",
        b": ",
        b"- ",
        b"\t",
        b"{",
        b"}",
        b"[",
        b"]",
        b"|",
        b">",
        b"'",
        b'"',
        b"=",
        b"0o",
        b"1e999",
        b"\xef\xbb\xbf",
    ),
]


def spliced(valid: bytes) -> st.SearchStrategy[bytes]:
    """``valid`` with tokens of YAML strewn in."""

    def apply(changes: list[tuple[int, bytes]]) -> bytes:
        content = valid
        for place, fragment in changes:
            start = place % (len(content) + 1)
            content = content[:start] + fragment + content[start:]
        return content

    change = st.tuples(st.integers(0, len(valid)), st.sampled_from(FRAGMENTS))
    return st.lists(change, min_size=1, max_size=4).map(apply)


SETS = (
    st.binary(max_size=200)
    | mutated(PETS_YAML)
    | spliced(PETS_YAML)
    | JSON.map(lambda value: yaml.safe_dump({"concepts": {"dog": value}}).encode())
    | JSON.map(lambda value: yaml.safe_dump({"concepts": value}).encode())
)


def test_the_set_that_is_fuzzed_is_valid(tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_bytes(PETS_YAML)
    assert list(load_concept_set(tmp_path / "set.yaml").concepts) == ["dog"]


@FUZZ
@given(content=DELTAS)
def test_any_bytes_as_a_delta(tmp_path: Path, content: bytes) -> None:
    check_delta(tmp_path / "edit.safetensors", content)


@FUZZ
@given(content=st.binary(max_size=300) | mutated(delta()))
def test_any_bytes_as_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    check_delta(tmp_path / "edit.ckpt", content)


@FUZZ
@given(content=SETS)
def test_any_bytes_as_a_concept_set(tmp_path: Path, content: bytes) -> None:
    check_set(tmp_path / "set.yaml", content)


@pytest.mark.slow
@LONG_FUZZ
@given(content=DELTAS)
def test_many_bytes_as_a_delta(tmp_path: Path, content: bytes) -> None:
    check_delta(tmp_path / "edit.safetensors", content)


@pytest.mark.slow
@LONG_FUZZ
@given(content=SETS)
def test_many_bytes_as_a_concept_set(tmp_path: Path, content: bytes) -> None:
    check_set(tmp_path / "set.yaml", content)


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_pickle_in_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "edit.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("edit/data.pkl", b"\x80\x02" + content)
        archive.writestr("edit/version", b"3")
    with pytest.raises(ValueError, match="ckpt_path="):
        read_edit(path)
