"""The public names: found without PyTorch, typed, and without names of Lightning."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lit_unlearn as lu

ROOT = Path(__file__).parents[2]


def test_public_names_are_there_and_others_are_not() -> None:
    assert set(lu.__all__) <= set(dir(lu))
    assert all(getattr(lu, name).__doc__ for name in lu.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'edlt'"):
        _ = lu.edlt  # type: ignore[attr-defined]


def test_a_wrong_name_is_told_before_pytorch_is_imported(tmp_path: Path) -> None:
    code = """
import sys, json, lit_unlearn as lu
said = []
for call in (
    lambda: lu.edit("dgo"), lambda: lu.edit("dog", recipe="ucee"), lambda: lu.edit("dog", judge="gpt"),
    lambda: lu.edit("dog", recipe="uce", options={"edit.lamda": 1}), lambda: lu.Edit("nowhere.ckpt"),
):
    try:
        call()
    except lu.UserError as error:
        said.append(str(error))
print(json.dumps([said, sorted({"torch", "lightning"} & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    said, heavy = json.loads(done.stdout)
    wanted = ("no concept 'dgo'", "no recipe 'ucee'", "judge='gpt' is no judge", "'lamda' (closest: lamb)", "not exist")
    assert [part for part, sentence in zip(wanted, said, strict=True) if part not in sentence] == []
    assert heavy == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["attack", "draw", "edit", "export", "grid", "score"])
def test_every_argument_is_documented_and_none_is_of_lightning(name: str) -> None:
    function = getattr(lu, name)
    arguments = inspect.signature(function).parameters
    assert [argument for argument in arguments if f" {argument}: " not in function.__doc__] == []
    assert "ightning" not in str(inspect.signature(function))


SCRIPT = """
from pathlib import Path

import lit_unlearn as lu

pipeline: lu.Pipeline = lu.Pipeline.load("emoji-sd", device="cpu")
concepts: lu.ConceptSet = lu.ConceptSet.of("Mickey Mouse", "a cartoon mouse", kind="character")
edit: lu.Edit = lu.edit(["dog", "cat"], recipe=Path("uce.yaml"), concept_set=concepts, options={"edit.lamb": 1.0})
widths: list[int] = [picture.width for picture in lu.draw(pipeline, "a dog")]
forget: float = lu.score(edit)["forget"]
shown: list[float] = [found.shown for found in lu.attack(edit.path, ["ring_a_bell"], steps=5)]
written: Path = lu.export(edit, "dog", format="lora", rank=4)
lu.export(edit, "dog", format="zip")  # wrong
lu.draw("a dog")  # wrong
lu.edlt("dog")  # wrong
"""


@pytest.mark.slow
def test_a_script_of_a_user_passes_mypy(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "pyproject.toml",  # and the cache of `make lint`
        script,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    lines = SCRIPT.splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if line.endswith("# wrong")]
    told = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert told == set(wrong), done.stdout
