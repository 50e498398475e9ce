from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from lit_unlearn.system import names
from lit_unlearn.system.errors import UserError
from lit_unlearn.system.names import (
    LONGEST_LABEL,
    check_numbers,
    check_output_name,
    check_path,
    check_prompts,
    file_name,
    is_text,
    joint_name,
    why_not,
)
from lit_unlearn.training.recipes import check_method

ODD = [
    *("aux", "AUX", "con.x", "nul ", "com1", "lpt³", "conin$", "Mr.", "Mr", "what?", "what*", "what", "a:b", "a|b"),
    *("a<b", "a>b", 'a"b', "a/b", "a\\b", "a_b.", "..", ".", "", " ", ".hidden", "_hidden", "~", "\n", "\x7f", "a+b"),
    *("\udcc3", "x" * 100, "x" * 101, "x" * 5000, "語" * 100, "語" * 99 + "犬", "𐐷" * 300, "x" * 99 + ".", "dog. "),
]
LEGAL = ["dog", "soccer ball", "Pokémon", "Van Gogh", "1.5-bit", "x" * 100, "con_man", "auxiliary"]


@pytest.mark.parametrize("label", LEGAL)
def test_a_name_that_every_system_can_have_stays(label: str) -> None:
    assert file_name(label) == label.replace(" ", "_")


@pytest.mark.parametrize("label", ODD)
def test_every_label_has_a_name_that_every_system_can_have(label: str) -> None:
    name = file_name(label)
    assert why_not(name) is None
    assert name not in ("", ".", "..")
    assert len(name) <= LONGEST_LABEL + 9
    assert len(name.encode()) <= 255  # of most file systems


def test_different_labels_have_different_names() -> None:
    # Also where a system takes upper and lower case for the same; spaces are underscores in a name of a concept, too.
    for a, b in itertools.combinations(ODD, 2):
        if a.casefold() != b.casefold():
            assert file_name(a).casefold() != file_name(b).casefold(), (a, b)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (["soccer ball"], "soccer_ball"),
        (["dog", "pixel art"], "dog+pixel_art"),
        (["a/b"], "a_b-c14cddc0"),
        (["aux", "dog"], "_aux-321f6814+dog"),
    ],
)
def test_folders_are_named_by_concepts(labels: list[str], name: str) -> None:
    assert joint_name(labels) == name


def test_many_concepts_share_a_folder_only_with_the_same_ones() -> None:
    first, second = ([f"concept number {i}" for i in (*range(19), last)] for last in (19, 20))
    assert joint_name(first).startswith("concept_number_0+19_others-")
    assert joint_name(first) == joint_name(list(first)) != joint_name(second)
    assert len(joint_name(["x" * 100] * 20)) <= LONGEST_LABEL


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("aux", "is the name of a device"),
        ("a:b", "holds ':'"),
        ("C:\\logs", "holds ':'"),
        ("a\\b", r"holds '\\\\'"),
        ("mine.", "ends with '.'"),
        ("mine/aux.txt", "is the name of a device"),
        ("../mine", "leads out of the folder of the runs"),
    ],
)
def test_names_of_methods_that_not_every_system_can_have(method: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_method(method)


def test_names_of_methods_that_every_system_can_have() -> None:
    for method in (None, "esd", "my method", "mine/esd-x", "v1.2"):
        check_method(method)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("C:\\exports\\dog?", "'dog?' holds '?'"),
        ("exports/aux/dog", "'aux' is the name of a device"),
        ("..\\dog.", "'dog.' ends with '.'"),
        ("a:b:c", "'b:c' holds ':'"),
    ],
)
def test_paths_that_windows_cannot_have(path: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_path("output", path)  # other systems can
    monkeypatch.setattr(names, "on_windows", lambda: True)
    with pytest.raises(ValueError) as caught:
        check_path("output", path)
    assert str(caught.value) == f"output={path!r}: {problem}, which Windows does not allow: rename it."


def test_paths_that_windows_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "on_windows", lambda: True)
    for path in ("C:\\exports\\dog", "\\\\server\\share\\dog", "..\\dog", "./dog.safetensors", "."):
        check_path("output", path)


@pytest.mark.parametrize(
    ("name", "suffixes", "may_be_folder", "message"),
    [
        (
            "model.safetensors",
            [],
            True,
            "output=model.safetensors names a .safetensors file, but what is written is a fol",
        ),
        ("a/edit.CKPT", [".safetensors"], True, "or a file that ends in .safetensors: name that"),
        ("report.html", [], True, "names a .html file"),
        ("dog.jpg", [".png"], False, "output=dog.jpg must end in .png"),
        ("dog", [".png"], False, "output=dog must end in .png"),
        ("folder.png", [".png"], False, "output=folder.png is a folder, but names a file"),
        ("file", [], True, "output=file is a file, but what is written is a folder"),
    ],
)
def test_an_output_that_cannot_be_what_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffixes: list[str], may_be_folder: bool, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("file").touch()
    with pytest.raises(ValueError, match=re.escape(message)):
        check_output_name(name, suffixes, may_be_folder)


@pytest.mark.parametrize("name", ["out", "emoji-sd-1.5", "v1.4", "out.d", "delta.safetensors", "a.b/c", "."])
def test_other_names_may_be_folders_or_files(name: str) -> None:
    check_output_name(name, [".safetensors"], may_be_folder=True)


def test_a_file_of_prompts_is_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("esd.csv", "prompts.TXT", "set.yaml"):
        check_prompts([name])  # words, as long as there is no such file
        Path(name).touch()
        with pytest.raises(ValueError, match=f"The prompt '{name}' is a file, which is not read"):
            check_prompts(["a dog", name])
    Path("a dog").touch()
    check_prompts(["a dog", "a photo of a.txt file" * 30])


def test_a_number_below_one_is_named_with_its_section() -> None:
    check_numbers(num=1, batch_size=None)
    with pytest.raises(ValueError, match=r"^num=0 must be at least 1\.$"):
        check_numbers(batch_size=3, num=0)
    with pytest.raises(ValueError, match=r"^model\.rounds=-1 must be at least 1\.$"):
        check_numbers("model", rounds=-1)


@pytest.mark.parametrize("name", ["dog", "モデル\u30001", "a\u00a0b", "👩\u200d🚀"])
def test_what_a_folder_may_be_called_is_text(name: str) -> None:
    assert is_text(name)


@pytest.mark.parametrize(
    "value", ["", " ", "a\nb", "\x1b[31mdog", "a\x00b", "a\u2028b", "a\u202eb", "\udcc3", None, 5, ["dog"]]
)
def test_what_moves_the_cursor_and_what_is_empty_is_not_text(value: object) -> None:
    assert not is_text(value)
