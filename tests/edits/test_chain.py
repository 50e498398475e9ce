"""Edits on top of edits: what a file says of each of them, and what is left without one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.edits.chain import Link, chain_of_delta, joined, links_of, split_weights, without
from lit_unlearn.edits.checkpoint import Edit, read_edit
from lit_unlearn.edits.export import export_delta, provenance
from lit_unlearn.edits.undo import write_without
from lit_unlearn.edits.verify import verify_export

LAYERS = [f"text_encoder.encoder.layers.{number}.mlp.fc2.weight" for number in (0, 1)]


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return BaseModel.find(str(tiny_sd))


@pytest.fixture(scope="module")
def values(base: BaseModel) -> dict[str, Tensor]:
    found = base.weights(LAYERS, torch.float32)
    assert found is not None
    return found


def link(concept: str, weights: dict[str, Tensor]) -> Link:
    return Link("UCE", [concept], list(weights), fingerprint(weights), {"concept": concept}, version="0.1.0")


def edit_of(base: BaseModel, values: dict[str, Tensor], weights: dict[str, Tensor], **fields: Any) -> Edit:
    own = {"concepts": ["dog"], "hyper_parameters": {"concept": "dog", "model": base.name}, **fields}
    before = fingerprint({name: values[name] for name in weights})
    return Edit(Path("a.ckpt"), "UCE", model=base.name, base_fingerprint=before, weights=weights, **own)


@pytest.fixture
def three(base: BaseModel, values: dict[str, Tensor]) -> Edit:
    """Three edits: of the first layer, of both, and of the second again."""
    first, second = LAYERS
    states = [values[first] + 1, values[first] + 2, values[second] + 2, values[second] + 3]
    chain = [
        link("dog", {first: states[0]}),
        link("cat", {first: states[1], second: states[2]}),
        link("owl", {second: states[3]}),
    ]
    overwritten = {f"1/{first}": states[0], f"2/{second}": states[2]}
    weights = {first: states[1], second: states[3]}
    concepts = ["dog", "cat", "owl"]
    return edit_of(base, values, weights, concepts=concepts, chain=chain, overwritten=overwritten)


def test_the_last_edit_is_taken_out_exactly(base: BaseModel, values: dict[str, Tensor], three: Edit) -> None:
    first, second = LAYERS
    two = without(three, 2, base)
    assert torch.equal(two.weights[first], values[first] + 2)
    assert torch.equal(two.weights[second], values[second] + 2)
    assert (two.concepts, two.hyper_parameters["concept"], len(two.chain)) == (["dog", "cat"], ["dog", "cat"], 2)
    one = without(two, 1, base)
    assert list(one.weights) == [first] and torch.equal(one.weights[first], values[first] + 1)
    assert one.base_fingerprint == fingerprint({first: values[first]})
    assert (one.concepts, list(one.chain), dict(one.overwritten)) == (["dog"], [], {})


def test_an_edit_under_others_is_taken_out_if_they_leave_its_weights_alone(
    base: BaseModel, values: dict[str, Tensor]
) -> None:
    first, second = LAYERS
    weights = {first: values[first] + 1, second: values[second] + 4}
    chain = [
        link("dog", {first: weights[first]}),
        link("cat", {second: values[second] + 3}),
        link("owl", {second: weights[second]}),
    ]
    edit = edit_of(
        base,
        values,
        weights,
        concepts=["dog", "cat", "owl"],
        chain=chain,
        overwritten={f"2/{second}": values[second] + 3},
    )
    left = without(edit, 0, base)
    assert list(left.weights) == [second] and torch.equal(left.weights[second], weights[second])
    assert list(left.overwritten) == [f"1/{second}"]  # the numbers of later edits go down by one
    assert [one.concepts for one in left.chain] == [["cat"], ["owl"]]
    again = without(left, 1, base)
    assert torch.equal(again.weights[second], values[second] + 3)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, r"edit 1, dog \(UCE\), cannot be taken out of a.ckpt: edit 2, cat \(UCE\), started from its"),
        (1, r"edit 2, cat \(UCE\), cannot be taken out of a.ckpt: edit 3, owl \(UCE\), started from its"),
    ],
)
def test_an_edit_that_later_ones_have_changed_stays(base: BaseModel, three: Edit, number: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        without(three, number, base)


def test_an_edit_whose_concept_was_edited_again_stays(base: BaseModel, values: dict[str, Tensor]) -> None:
    first, second = LAYERS
    weights = {first: values[first] + 1, second: values[second] + 1}
    chain = [
        link("dog", {first: weights[first]}),
        replace(link("cat", {second: weights[second]}), again=["dog"]),
    ]
    edit = edit_of(base, values, weights, concepts=["dog", "cat"], chain=chain)
    with pytest.raises(ValueError, match=r"edit 2, cat \(UCE\), has edited dog again; take out edit 2 first"):
        without(edit, 0, base)
    assert without(edit, 1, base).concepts == ["dog"]


def test_the_only_edit_stays(base: BaseModel, values: dict[str, Tensor]) -> None:
    edit = edit_of(base, values, {LAYERS[0]: values[LAYERS[0]] + 1})
    with pytest.raises(ValueError, match=r"a.ckpt holds one edit, dog \(UCE\): to be without it, use the base"):
        without(edit, 0, base)


def test_edits_side_by_side(base: BaseModel, values: dict[str, Tensor], three: Edit) -> None:
    first, second = LAYERS
    one = edit_of(base, values, {first: values[first] + 1})
    other = edit_of(base, values, {second: values[second] + 1}, concepts=["cat"])
    weights, links, overwritten = joined([one, other])
    assert set(weights) == {first, second} and [each.concepts for each in links] == [["dog"], ["cat"]]
    assert overwritten == {}
    _, links, overwritten = joined([three])
    assert len(links) == 3 and set(overwritten) == {f"1/{first}", f"2/{second}"}
    message = r"base_edit=a.ckpt \(dog, cat, owl\) and b.ckpt \(dog, cat, owl\) do not go .* and 1 more weights"
    with pytest.raises(ValueError, match=message):
        joined([three, replace(three, path=Path("b.ckpt"))])
    with pytest.raises(ValueError, match=r"base_edit=a.ckpt is given twice: once is enough"):
        joined([three, three])


def test_a_delta_says_what_each_edit_was(base: BaseModel, three: Edit, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    export_delta(three, provenance(three, base), path, None)
    read = read_edit(path)
    assert list(read.chain) == list(three.chain)
    assert read.weights.keys() == three.weights.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in three.weights.items())
    assert read.overwritten.keys() == three.overwritten.keys()
    assert all(torch.equal(read.overwritten[key], value) for key, value in three.overwritten.items())
    assert all(finding.ok for finding in verify_export(path, base))
    assert without(read, 2, base).concepts == ["dog", "cat"]


def test_hashes_are_those_of_the_values_as_they_are_written(base: BaseModel, three: Edit, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    export_delta(three, provenance(three, base), path, torch.float16)
    read = read_edit(path)
    assert [one.sha256 for one in read.chain] != [one.sha256 for one in three.chain]
    assert read.chain[-1].sha256 == fingerprint({LAYERS[1]: three.weights[LAYERS[1]].half()})
    assert read.version is None  # that of the fit, which is not known here


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in nested lists and mappings, without the root's."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_a_field_of_the_wrong_kind_anywhere_is_refused_or_takes_out_the_same_edit(
    base: BaseModel, three: Edit, tmp_path: Path
) -> None:
    path, output = tmp_path / "delta.safetensors", tmp_path / "left.safetensors"
    export_delta(three, provenance(three, base), path, None)
    with safe_open(path, "pt") as file:
        stored = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    facts = {name: json.loads(text) for name, text in sorted(stored.items()) if name != "format"}
    refused, read = set(), set()
    for place, wrong in zip(places(facts), cycle([None, 5, True, "", [], ["x"], [[1]], {"x": 1}])):
        damaged = copy.deepcopy(facts)
        at = damaged
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = wrong
        save_file(tensors, path, {"format": "pt"} | {name: json.dumps(value) for name, value in damaged.items()})
        try:
            edit = read_edit(path)
            write_without(edit, 2, output, model=base.name, overwrite=True)
        except ValueError as error:
            assert len(str(error)) < 500
            refused.add(place[0])
            continue
        read.add(place[0])
        assert torch.equal(read_edit(output).weights[LAYERS[1]], three.overwritten[f"2/{LAYERS[1]}"])
    assert {"method", "concepts", "concept_set_sha256", "base_model", "base_fingerprint", "edit", "chain"} <= refused
    assert "scores" in read  # what nothing is computed from


def broken(change: Callable[[list[dict[str, Any]], dict[str, Tensor]], None], three: Edit) -> None:
    links, overwritten = [one.stored() for one in three.chain], dict(three.overwritten)
    change(links, overwritten)
    chain_of_delta(Path("a.safetensors"), links, overwritten, three.weights, three.concepts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda links, old: links.pop(), "its weights are not those|is missing, or not a value"),
        (lambda links, old: links.clear(), "its chain is not a list of edits"),
        (lambda links, old: links[0].update(names="all"), "the names of an edit in its chain is of the wrong type"),
        (lambda links, old: links[0].update(shell="rm"), "has the field 'shell', which this version does not know"),
        (lambda links, old: links[0].pop("method"), "lacks a field"),
        (lambda links, old: links[0].update(names=["unet.a"]), "its weights are not those of the edits in its chain"),
        (lambda links, old: links[0].update(sha256="0" * 64), "its edit 1 does not have the hash that its chain says"),
        (lambda links, old: links[1].update(concepts=["owl"]), "its concepts are not those of the edits in its chain"),
        (lambda links, old: links[0].update(names=[]), "the names of an edit in its chain is of the wrong type"),
        (lambda links, old: old.pop(f"1/{LAYERS[0]}"), "is missing, or not a value that an edit in its chain"),
        (lambda links, old: old.update({f"7/{LAYERS[0]}": torch.zeros(1)}), "is missing, or not a value"),
        (lambda links, old: old.update({f"1/{LAYERS[0]}": torch.zeros(1)}), "does not fit its weight"),
        (lambda links, old: old[f"1/{LAYERS[0]}"].__setitem__(0, torch.nan), "does not fit its weight"),
    ],
)
def test_a_chain_of_somebody_else_is_not_trusted(
    three: Edit, change: Callable[[list[dict[str, Any]], dict[str, Tensor]], None], message: str
) -> None:
    broken(lambda links, old: None, three)
    with pytest.raises(ValueError, match=rf"ckpt_path=a.safetensors is no valid edit \(.*({message})"):
        broken(change, three)


def test_a_single_edit_is_a_chain_of_one(base: BaseModel, values: dict[str, Tensor]) -> None:
    edit = edit_of(base, values, {LAYERS[0]: values[LAYERS[0]] + 1}, version="0.0.9")
    (own,) = links_of(edit)
    assert (own.method, own.concepts, own.names, own.version) == ("UCE", ["dog"], [LAYERS[0]], "0.0.9")
    assert own.sha256 == fingerprint(edit.weights)
    assert Link.read(own.stored()) == own


def test_replaced_values_have_names_of_their_own() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    weights, replaced = split_weights({"unet.a.weight": one, "overwritten.12.unet.a.weight": two})
    assert (list(weights), list(replaced)) == (["unet.a.weight"], ["12/unet.a.weight"])
