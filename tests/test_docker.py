"""The Dockerfile, instruction by instruction, and its install steps in a clean folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lit_unlearn import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

APT = {"apt-get", "rm"}
USER = {"useradd", "mkdir", "chown"}


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of every instruction, comments and line breaks taken out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines)]


def arguments(name: str) -> list[str]:
    return [rest for keyword, rest in instructions() if keyword == name]


def commands(run: str) -> list[list[str]]:
    """The commands of a RUN, each in words."""
    return [shlex.split(command) for command in run.split("&&")]


def environment() -> dict[str, str]:
    words = [word for line in arguments("ENV") for word in shlex.split(line)]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves ``path`` out: the last pattern decides that matches it or a folder above it."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(rf"{pattern}(/.*)?", path):
            out = not line.startswith("!")
    return out


def copied(arguments: str) -> tuple[list[str], str]:
    """Sources and destination of a COPY."""
    *sources, destination = shlex.split(arguments)
    return sources, destination


# --- what each instruction says


def test_the_instructions_are_few_and_in_order() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM" and names[-2:] == ["ENTRYPOINT", "CMD"]
    assert set(names) <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    (base,) = arguments("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base)  # whose Python is 3.12


def test_nothing_is_run_but_apt_make_and_the_making_of_a_user() -> None:
    kinds = []
    for run in arguments("RUN"):
        assert not re.search(r"[;|<>`$]", run), run  # commands one after the other, and no more shell than that
        programs = {words[0] for words in commands(run)}
        kinds.append(next(kind for kind in (APT, {"make"}, USER) if programs <= kind))
    assert kinds == [APT, {"make"}, USER]


def test_apt_brings_what_the_makefile_needs_and_leaves_no_lists() -> None:
    update, install, clean = commands(arguments("RUN")[0])
    assert update == ["apt-get", "update"]
    assert install[:4] == ["apt-get", "install", "--yes", "--no-install-recommends"]
    assert install[4:] == ["make", "python3", "python3-venv"]
    assert clean == ["rm", "-rf", "/var/lib/apt/lists/*"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "PYTHON ?= python3\n" in makefile and "$(PYTHON) -m venv $(VENV)" in makefile


def test_make_is_asked_for_targets_and_variables_that_it_has() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = [words[1:] for run in arguments("RUN") for words in commands(run) if words[0] == "make"]
    assert asked == [["install", "EXTRAS="]]
    for word in asked[0]:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} \?= " if is_variable else rf"^{name}:", makefile, flags=re.MULTILINE), word


def test_what_is_copied_exists_and_is_not_left_out() -> None:
    for line in arguments("COPY"):
        for source in copied(line)[0]:
            assert (ROOT / source).exists(), source
            assert source == "." or not ignored(source), source


def test_what_the_program_needs_is_copied_and_what_it_does_not_is_left_out() -> None:
    for path in ("lit_unlearn/cli.py", "configs/null_space.yaml", "checkpoints/emoji-sd/model_index.json", "LICENSE"):
        assert (ROOT / path).is_file() and not ignored(path), path
    for path in (".git/config", ".venv/bin/python", "logs/null_space/x", "checkpoints/mine/unet/x.safetensors"):
        assert ignored(path), path
    assert ignored("lit_unlearn/core/__pycache__/x.pyc") and ignored("__pycache__/x.pyc")


def test_dependencies_are_installed_before_the_code_is_copied() -> None:
    names = [(name, rest) for name, rest in instructions() if name == "COPY" or rest.startswith("make")]
    assert [name for name, _ in names] == ["COPY", "COPY", "RUN", "COPY"]
    there = {source for line in names[:2] for source in copied(line[1])[0]}
    # What the Makefile's target depends on, and what pyproject.toml names and building reads.
    assert there == {
        *("Makefile", "pyproject.toml", "constraints.txt", "lit_unlearn/__init__.py"),
        *(PROJECT["readme"], *PROJECT["license-files"]),
    }


def test_the_entry_point_is_the_console_script_on_the_path() -> None:
    (entrypoint,), (command,), (user,) = arguments("ENTRYPOINT"), arguments("CMD"), arguments("USER")
    assert [*json.loads(entrypoint), *json.loads(command)] == ["lit-unlearn", "--help"]
    assert "lit-unlearn" in PROJECT["scripts"]
    assert user not in ("root", "0")
    assert any(words[0] == "useradd" and words[-1] == user for run in arguments("RUN") for words in commands(run))
    source, workplace = arguments("WORKDIR")
    assert environment()["PATH"] == f"{source}/.venv/bin:$PATH"
    assert ["chown", f"{user}:{user}", workplace] in commands(arguments("RUN")[-1])


# --- what they do


def copy(source: str, destination: Path) -> None:
    """Copy ``source``, a file or a folder of the project, as docker does."""
    if (ROOT / source).is_file():
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / source, destination)
        return
    for folder, folders, names in os.walk(ROOT / source):
        inside = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored((inside / name).as_posix())]
        for name in names:
            if not ignored((inside / name).as_posix()):
                (destination / inside).mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / inside / name, destination / inside)


@pytest.mark.slow
def test_the_steps_after_apt_install_a_program_that_runs(tmp_path: Path) -> None:
    image, workplace = tmp_path / "opt", tmp_path / "workspace"
    image.mkdir()
    workplace.mkdir()
    # No cache saves space in an image; here it saves time.
    extra = {name: value for name, value in environment().items() if name not in ("PATH", "PIP_NO_CACHE_DIR")}
    env = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **extra}

    for name, rest in instructions():
        if name == "COPY":
            sources, destination = copied(rest)
            for source in sources:
                copy(source, image / destination)
        elif name == "RUN" and rest.startswith("make "):
            words = [*shlex.split(rest), f"PYTHON={sys.executable}"]
            result = subprocess.run(
                words, cwd=image, env=env, capture_output=True, text=True, check=False, encoding="utf-8"
            )
            assert result.returncode == 0, result.stderr[-2000:]
    assert not (image / ".git").exists() and not (image / "logs").exists()
    assert (image / "checkpoints/emoji-sd/model_index.json").is_file()

    env["PATH"] = f"{image / '.venv/bin'}{os.pathsep}{env['PATH']}"
    (program,) = json.loads(arguments("ENTRYPOINT")[0])

    def run(*words: str) -> str:
        found = shutil.which(program, path=env["PATH"])
        assert found == str(image / ".venv/bin" / program)
        return subprocess.run(
            [found, *words],
            cwd=workplace,
            env=env,
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        ).stdout

    assert run("--version") == f"lit-unlearn {__version__}\n"
    assert run("--help").startswith("usage: lit-unlearn COMMAND")
    assert "null_space" in run("--help")  # recipes are found
    # Torch and the rest, the recipes and the embedded model are found; nothing is drawn.
    assert "model: emoji-sd" in run("fit", "--config", "null_space.yaml", "--concept", "dog", "--print_config")
    assert [path.name for path in workplace.iterdir()] == []
    installed = {path.name.split("-")[0] for path in (image / ".venv").glob("lib/python*/site-packages/*.dist-info")}
    assert "torch" in installed and "pytest" not in installed  # EXTRAS= leaves the tools out
