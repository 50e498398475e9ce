"""A run belongs to its concept set: no command goes on with it, tests it or attacks it with another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_unlearn import cli
from lit_unlearn.data.concepts import load_concept_set

SET = "--model.init_args.concept_set"
CHECKPOINT = "logs/null_space/dog/version_0/checkpoints/last.ckpt"


def write_set(name: str, **changes: str) -> str:
    """A copy of emoji20 in ``own.yaml``, with another name and other fields of the owl."""
    content = load_concept_set("emoji20").content() | {"name": name}
    content["concepts"]["owl"] |= changes
    Path("own.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return "own.yaml"


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
def test_a_run_of_another_set_is_refused_before_anything_is_loaded(
    command: str, recipe: Path, run_folder: Path, refuses: Callable[..., str]
) -> None:
    own = write_set("emoji20", anchor="a bird.")
    message = refuses(command, "--config", str(recipe), SET, own, "--ckpt_path", CHECKPOINT)
    assert message.startswith(
        f"{CHECKPOINT} was made with other content of the concept set 'emoji20' than own.yaml has"
    )
    message = refuses(
        command, "--config", str(recipe), SET, write_set("mine", anchor="a bird."), "--ckpt_path", CHECKPOINT
    )
    assert "was made with the concept set 'emoji20', not with 'mine' (own.yaml)" in message
    if command != "fit":
        message = refuses(command, "--config", str(recipe), SET, own)
        assert "has none (logs/null_space/dog is of another concept set)" in message


def test_a_copy_of_the_set_is_the_same_set(recipe: Path, run_folder: Path) -> None:
    own = write_set("mine")
    assert cli.main(["test", "--config", str(recipe), SET, own, "--ckpt_path", CHECKPOINT]) == 0


def test_a_set_that_has_changed_since_is_refused(recipe: Path, workplace: Path, request: pytest.FixtureRequest) -> None:
    own = write_set("mine", anchor="a bird.")
    assert cli.main(["fit", "--config", str(recipe), SET, own]) == 0
    refuses: Callable[..., str] = request.getfixturevalue("refuses")  # from here on nothing is loaded
    (checkpoint,) = Path("logs").glob("null_space/dog@mine-*/version_0/checkpoints/last.ckpt")
    write_set("mine", anchor="another bird")
    changed = f"{checkpoint.as_posix()} was made with other content of the concept set 'mine' than own.yaml has now: "
    assert refuses("attack", "--ckpt_path", checkpoint.as_posix()).startswith(changed)
    message = refuses("test", "--config", str(recipe), SET, own)
    assert f"has none ({checkpoint.parents[2].as_posix()} is of another concept set): run" in message
    assert refuses("fit", "--config", str(recipe), SET, own, "--ckpt_path", str(checkpoint)).startswith(changed)
