"""The files that install, build and check the project agree with each other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def constraints(python_version: str) -> dict[str, str]:
    """Pinned version of every package under a Python version; fails where a line is not an exact pin or pins twice."""
    pins: dict[str, str] = {}
    for line in read("constraints.txt").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice for Python {python_version}"
            pins[name] = specifier.version
    return pins


def requirements() -> Iterable[Requirement]:
    project = pyproject()["project"]
    extras = project["optional-dependencies"].values()
    return map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)])


def makefile_recipe(target: str) -> list[str]:
    """Prerequisites and recipe lines of a Makefile target, `$(BIN)` and `$(STAMP)` put in."""
    text = read("Makefile").replace("$(BIN)", ".venv/bin").replace("$(STAMP)", ".venv/.installed")
    match = re.search(rf"^{re.escape(target)}:(.*)\n((?:\t.*\n?)*)", text, flags=re.MULTILINE)
    assert match is not None, f"the Makefile has no target {target}"
    return [match[1].split("##")[0].strip(), *match[2].replace("\t", "").splitlines()]


def instructions(keyword: str) -> list[str]:
    """Arguments of every instruction of that name in the Dockerfile."""
    text = read("Dockerfile").replace("\\\n", " ")
    return re.findall(rf"^{keyword} (.*)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_satisfy_the_requirements(python_version: str) -> None:
    pins = constraints(python_version)
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_torch_is_pinned() -> None:
    assert constraints("3.11")["torch"] == "2.13.0"


def test_what_is_not_required() -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements()}
    assert not names & {"torchvision", "pytorch-lightning"}


def test_every_requirement_has_a_lower_bound() -> None:
    for requirement in requirements():
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement


def test_every_target_sets_up_the_environment() -> None:
    prerequisites, *recipe = makefile_recipe(".venv/.installed")
    assert prerequisites.split() == ["pyproject.toml", "constraints.txt"]
    assert any("pip install --constraint constraints.txt --editable" in line for line in recipe)
    for target in ("install", "demo", "test", "test-slow", "test-devices", "lint", "hooks"):
        assert makefile_recipe(target)[0].split()[0] == ".venv/.installed", target


def test_the_oldest_packages_have_an_environment_of_their_own() -> None:
    (prerequisite, run), setup = makefile_recipe("test-lowest"), makefile_recipe("$(LOWEST)/.installed")
    assert prerequisite == "$(LOWEST)/.installed"
    assert run.startswith("$(LOWEST)/bin/python -m pytest")
    (install,) = [line for line in setup if "pip install" in line]
    assert {"--python $(LOWEST)/bin/python", "--resolution lowest-direct"} <= set(re.findall(r"--\S+ \S+", install))
    assert "constraint" not in install


def test_docker_installs_as_the_makefile_does() -> None:
    runs = instructions("RUN")
    assert [run for run in runs if re.search(r"\b(make|pip) install\b", run)] == ["make install EXTRAS="]
    assert not any("pip" in run.split() for run in runs)


def test_docker_runs_the_command_line_as_an_ordinary_user() -> None:
    (entrypoint,) = instructions("ENTRYPOINT")
    (user,) = instructions("USER")
    assert entrypoint == '["lit-unlearn"]'
    assert user not in ("root", "0")
    assert "lit-unlearn" in pyproject()["project"]["scripts"]


def test_files_named_by_the_makefile_and_docker_exist() -> None:
    copied = [name for line in instructions("COPY") for name in shlex.split(line)[:-1]]
    for name in [*copied, *makefile_recipe(".venv/.installed")[0].split()]:
        assert (ROOT / name).exists(), name


def test_the_packaged_paths_are_the_ones_mapped() -> None:
    wheel = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {path.lstrip("/") for path in wheel["include"]} == {"lit_unlearn", *wheel["sources"]}


def test_ci_runs_make_targets_that_exist() -> None:
    targets = re.findall(r"^make (\S+)$", read(".ci/run"), flags=re.MULTILINE)
    assert {"lint", "test"} <= set(targets)
    for target in targets:
        makefile_recipe(target)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.slow
def test_wheel_carries_recipes_concepts_and_the_embedded_model(tmp_path: Path) -> None:
    # Built from a copy, so that the build leaves nothing in the tree; what git ignores is ignored there, too.
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for name in ("lit_unlearn", "configs", "checkpoints/emoji-sd"):
        shutil.copytree(ROOT / name, tree / name)
    stray = tree / "checkpoints" / "run"
    stray.mkdir()
    (stray / "stray.safetensors").write_bytes(b"")

    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    def carried(folder: str, target: str, pattern: str) -> set[str]:
        paths = [path for path in (ROOT / folder).rglob(pattern) if path.is_file()]
        assert paths, f"{folder} holds no {pattern}"
        return {f"{target}/{path.relative_to(ROOT / folder).as_posix()}" for path in paths}

    assert carried("configs", "lit_unlearn/configs", "*.yaml") <= names
    assert carried("checkpoints/emoji-sd", "lit_unlearn/checkpoints/emoji-sd", "*") <= names
    assert carried("lit_unlearn", "lit_unlearn", "*.py") <= names
    assert carried("lit_unlearn/data", "lit_unlearn/data", "*.yaml") <= names
    assert carried("lit_unlearn/emoji", "lit_unlearn/emoji", "*.yaml") <= names
    assert "lit_unlearn/emoji/sprites.png" in names
    assert not [name for name in names if "stray" in name or name.endswith(".pyc") or name.startswith("tests/")]
    assert any(name.endswith("licenses/NOTICE") for name in names)
