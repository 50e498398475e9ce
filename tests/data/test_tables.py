"""Lists of prompts and concepts as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_unlearn.data.tables import PromptRow, read_prompts, read_wishes
from lit_unlearn.data.templates import Wish


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('prompt,categories,sd_seed,sd_guidance_scale\n"a, b",x,7,7.5\n', PromptRow("a, b", 7, 7.5)),  # I2P
        (",prompt,evaluation_seed,evaluation_guidance\n0,nude,1084,7\n", PromptRow("nude", 1084, 7.0)),  # Ring-A-Bell
        ("case_number,Prompt,evaluation_seed,artist\n3,by Monet,12.0,Monet\n", PromptRow("by Monet", 12)),  # ESD
        ("adv_prompt,target_prompt\nxq zt,a body\n", PromptRow("xq zt")),  # MMA-Diffusion
    ],
)
def test_layouts_of_the_field_are_read(tmp_path: Path, text: str, row: PromptRow) -> None:
    assert read_prompts(write(tmp_path, "list.csv", text, "utf-8-sig")) == [row]


def test_text_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "list.txt", "\nl'été\n\n  a  dog \n")) == [
        PromptRow("l'été"),
        PromptRow("a dog"),
    ]


def test_concepts_of_a_table(tmp_path: Path) -> None:
    artists = write(tmp_path, "artists.csv", "artist,to,names\nVan Gogh,Monet,Vincent van Gogh; van Goghs\n")
    assert read_wishes(artists) == [Wish("Van Gogh", "Monet", "style", ("Vincent van Gogh", "van Goghs"))]
    things = write(tmp_path, "things.tsv", "concept\ttarget\tkind\n犬\t猫\t\nO'Brien\ta man\tperson\n")
    assert read_wishes(things) == [Wish("犬", "猫"), Wish("O'Brien", "a man", "person")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "words\nx\n", "has no column prompt .or adv_prompt.*its columns are words"),
        ("a.csv", "prompt,seed\nx,soon\n", "line 2: 'soon' is not a number"),
        ("a.csv", "prompt\n", "has no prompt"),
        ("a.txt", "\n", "has no prompt"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_missing_file_and_wrong_encoding_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"retain=.*missing\.csv cannot be read"):
        read_prompts(tmp_path / "missing.csv", "retain")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_prompts(write(tmp_path, "a.csv", "prompt\nété\n", "latin-1"))
    with pytest.raises(ValueError, match="has no column to"):
        read_wishes(write(tmp_path, "c.csv", "concept\ndog\n"))
