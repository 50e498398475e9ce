"""The documentation: its site builds, and its commands are run, or understood to the end where the page says so."""

from __future__ import annotations

import functools
import http.server
import itertools
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import lit_unlearn
from lit_unlearn.cli import main
from lit_unlearn.commands.registry import OTHER_COMMANDS, TRAINER_COMMANDS
from lit_unlearn.training.recipes import find_recipe

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))]
FILES = {"--ckpt_path", "--after", "--base_edit", "--model", "--model.model", "--model.init_args.model", "--concept"}
FILES |= {"--model.start"}
"""Options whose values on the pages stand for files and names of the reader."""


def commands(page: Path) -> Iterator[str]:
    """The commands of lit-unlearn in the code blocks of a page, each on one line, without comments."""
    fenced = False
    for line in re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and (
            found := re.match(r"\s*(?:\$ )?lit-unlearn (.*?)(\s+#.*)?$", line)
        ):
            yield found[1]


WRITTEN = sorted({command for page in PAGES for command in commands(page)})
OTHERS = [command for command in WRITTEN if command.split()[0] in OTHER_COMMANDS]
TRAINERS = [command for command in WRITTEN if command.split()[0] in TRAINER_COMMANDS]


def test_every_command_is_known() -> None:
    assert len(WRITTEN) > 60
    assert set(OTHERS) | set(TRAINERS) == set(WRITTEN)


@pytest.mark.parametrize("command", OTHERS)
def test_commands_are_parsed_to_the_end(command: str) -> None:
    name, *options = shlex.split(command.replace("$i", "3"))  # in a loop of the shell
    parser = import_module(f"lit_unlearn.commands.{name}").parser()
    if name == "attack":
        options = options[: next((i for i, o in enumerate(options) if "." in o and o.startswith("--")), None)]
        options = [option for option in options if not option.startswith("my_package")]
    parsed = vars(parser.parse_args(options))
    given = {option[2:].partition("=")[0] for option in options if option.startswith("--")}
    assert given - set(parsed) == set() or name == "plan"  # which hands them on to a fit


@pytest.mark.parametrize("command", TRAINERS)
def test_recipes_are_there(command: str) -> None:
    options = shlex.split(command)
    for option, value in itertools.pairwise(options):
        if option == "--config":
            assert find_recipe(value).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in TRAINERS if "my_package" not in c and ".help" not in c])
def test_options_of_fits_and_tests_are_parsed_to_the_end(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for a file or a name of the reader is left out, and the configuration is printed instead of run."""
    monkeypatch.chdir(tmp_path)
    options = shlex.split(command)
    name, given = options[0], list(zip(options[1::], [*options[2:], ""], strict=True))
    kept = [name]
    for option, value in given:
        if not option.startswith("--") or option in FILES or option.startswith("--print_config"):
            continue
        if option.endswith("concept_set") and value.endswith(".yaml"):  # a set of the reader
            continue
        kept += [option] if value.startswith("--") or not value else [option, value]
    assert main([*kept, "--print_config"]) == 0, capsys.readouterr().err
    assert "model:" in capsys.readouterr().out


NOT_RUN = (
    (r"sd14|sd35|sdxl|flux|FOLDER|CompVis|v1-5|VanGogh@", "weights that do not come with the project"),
    (r"devices 4", "several GPUs"),
    (r"^app ", "a person in front of a browser"),
    (r"emoji/|siss|logs/esd|--model\.rounds 10|^fit --config esd", "a fit of more than two minutes"),
    (r"my_package|\.\.\.|…|\bRUN\b|\bDIR\b|METHOD|my_dog|dogs/ |edited/|model\.ckpt", "files of yours"),
    (r"textual_inversion|pets\.yaml|artists|null_space_authors", "files of yours"),
)
"""What the commands that no test runs need; each is parsed to the end."""
FIRST = {
    "docs/guides/prove.md": ["fit --config null_space.yaml --concept dog"],
    "docs/guides/sweep.md": ["fit --config uce.yaml --concept dog", "test --config uce.yaml --concept dog"],
    "docs/null_space.md": ["fit --config null_space.yaml --concept dog"],
    "docs/runs.md": ["fit --config null_space.yaml --concept dog"],
}
"""What is run before the commands of pages that begin with a run that is there."""


def needs(command: str) -> str | None:
    """What a command needs that the tests do not have; None if they run it."""
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, command)), None)


def note(page: Path) -> str:
    """The sentence in which a page says which of its commands are run."""
    written = list(commands(page))
    reasons = list(dict.fromkeys(reason for command in written if (reason := needs(command))))
    listed = " or ".join(filter(None, [", ".join(reasons[:-1]), reasons[-1] if reasons else ""]))
    kept = [command for command in written if needs(command) is None]
    quick = any(command.startswith("attack") and "--attacks" not in command for command in kept)
    more = " Where no attack is named, they run the fastest." if quick else ""
    if not reasons:
        return f"The tests run the `lit-unlearn` commands of this page on the embedded models.{more}"
    if not kept:
        return (
            "The tests parse the `lit-unlearn` commands of this page to the end; they do not run them, since they need "
            f"{listed}."
        )
    return (
        "The tests run the `lit-unlearn` commands of this page on the embedded models, except those that need "
        f"{listed}; these are only parsed to the end.{more}"
    )


WITH_COMMANDS = [page for page in PAGES if list(commands(page))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.relative_to(TOP).as_posix())
def test_a_page_says_which_of_its_commands_are_run(page: Path) -> None:
    assert note(page) in " ".join(page.read_text(encoding="utf-8").split())


def test_most_pages_have_a_command_that_is_run() -> None:
    run = [page for page in WITH_COMMANDS if not all(map(needs, commands(page)))]
    assert len(run) >= 14
    assert {"README.md", *FIRST} <= {page.relative_to(TOP).as_posix() for page in run}


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")  # what a command warns of is for its reader, such as a cut prompt
@pytest.mark.parametrize(
    "page",
    [page for page in WITH_COMMANDS if not all(map(needs, commands(page)))],
    ids=lambda page: page.relative_to(TOP).as_posix(),
)
def test_commands_of_a_page_are_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [command.replace("$i", "3") for command in commands(page) if needs(command) is None]
    for command in [*FIRST.get(page.relative_to(TOP).as_posix(), []), *written]:
        name, *options = shlex.split(command)
        folder = tmp_path / ("alone" if name == "demo" else "together")  # a demo makes the runs that others make too
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        fewer = ["--trainer.enable_progress_bar", "false"] if name in TRAINER_COMMANDS else []
        fewer = [] if "--edit.help" in options else fewer
        if name == "test" and "--data.images_per_prompt" not in command:
            fewer += ["--data.images_per_prompt", "1"]
        fewer += ["--attacks", "noise_probe"] if name == "attack" and "--attacks" not in options else []
        assert main([name, *options, *fewer]) == 0, command


def test_there_is_python_on_the_page_about_it() -> None:
    assert len(python_blocks(TOP / "docs" / "python.md")) >= 7


@pytest.mark.slow
def test_python_of_its_page_is_run(tmp_path: Path) -> None:
    """In a process of its own, as a user's program."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(python_blocks(TOP / "docs" / "python.md")), encoding="utf-8")
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "closest names: dog" in done.stdout
    assert (tmp_path / "edited.png").is_file()


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link or anchor fails it."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore::EncodingWarning", "-m", "mkdocs", "build", "--strict", "--site-dir"]
    made = subprocess.run([*command, folder], cwd=TOP, capture_output=True, encoding="utf-8")
    assert made.returncode == 0, made.stderr
    return folder


def test_site_has_all_pages_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES[1:]:
        assert (site / page.relative_to(TOP / "docs").with_suffix(".html")).is_file()
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert [address for address in loaded if "lit-unlearn" not in address] == []


def test_reference_is_made_from_the_program(site: Path) -> None:
    said = (site / "reference/commands.html").read_text(encoding="utf-8")
    for name in (*TRAINER_COMMANDS, *OTHER_COMMANDS):
        assert f'id="lit-unlearn-{name}"' in said
    assert "--single_file" in said
    recipes = (site / "reference/recipes.html").read_text(encoding="utf-8")
    assert all(f">{file.name}" in recipes for file in (TOP / "configs").glob("*.yaml"))
    api = (site / "python.html").read_text(encoding="utf-8")
    assert all(f'id="lit_unlearn.{name}"' in api for name in lit_unlearn.__all__)
    assert "Pipeline" in (site / "examples/first_edit.html").read_text(encoding="utf-8")
    assert (site / "examples/first_edit.ipynb").is_file()
    python = (site / "reference/python.html").read_text(encoding="utf-8")
    assert "Draw each prompt" in python or "from its own seed" in python


@pytest.mark.slow
def test_search_field_finds_a_parameter(site: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/index.html")
        field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
        browser.execute_script("arguments[0].focus()", field)
        field.send_keys("forget_unused")
        found = WebDriverWait(browser, 30).until(
            lambda driver: driver.find_elements(By.CSS_SELECTOR, ".md-search-result__item a")
        )
        links = [link.get_attribute("href") for link in found]
        server.shutdown()
    assert any("null_space" in link for link in links)
