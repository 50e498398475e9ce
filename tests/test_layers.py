"""Imports point one way, from a layer to those on its left, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_unlearn"

FLOORS = (
    "cli",
    "commands",
    "api",
    "training",
    "attacks",
    "callbacks",
    "edits",
    "methods",
    "reports",
    "evaluation",
    "emoji",
    "judges",
    "data",
    "diffusion",
    "core",
    "system",
)
"""The rooms from the top floor down: each may import those below it, and none above."""

LAYERS: dict[str, set[str]] = {room: set(FLOORS[place + 1 :]) for place, room in enumerate(FLOORS)}

NEVER = {
    "pytorch_lightning": "a second class tree beside lightning.pytorch, whose classes are not the same",
    "torchvision": "not a dependency",
}
PIPELINE_LIBRARIES = {"diffusers", "transformers"}
PIPELINE_LAYERS = {"diffusion", "emoji", "judges"}


def imported_names(source: str, package: str) -> set[str]:
    """Dotted names of everything ``source`` imports, wherever in it, relative imports resolved against ``package``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def layer_of(path: Path) -> str | None:
    """The room that a file belongs to; none for the two that start the program."""
    parts = path.relative_to(PACKAGE).parts
    room = parts[0] if len(parts) > 1 else path.stem
    return None if room in ("__init__", "__main__") else room


def violations(layer: str | None, names: set[str]) -> list[str]:
    """Which of the imported names a file of the layer must not import, with the reason."""
    found = []
    for name in sorted(names):
        library, *rest = name.split(".")
        if library in NEVER:
            found.append(f"{name}: {NEVER[library]}")
        elif library in PIPELINE_LIBRARIES and layer not in PIPELINE_LAYERS:
            found.append(f"{name}: only {sorted(PIPELINE_LAYERS)} import {library}")
        elif layer == "core" and library not in {"torch", "lit_unlearn", *sys.stdlib_module_names}:
            found.append(f"{name}: core imports torch and the standard library only")
        elif library == "lit_unlearn" and layer is not None and rest:
            at_the_top = rest[0] not in LAYERS and (PACKAGE / f"{rest[0]}.py").is_file()
            if at_the_top or (rest[0] in LAYERS and rest[0] not in LAYERS[layer] | {layer}):
                found.append(f"{name}: {layer} imports only from {sorted(LAYERS[layer]) or 'itself'}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_subpackage_has_its_place() -> None:
    assert {layer_of(path) for path in FILES} - {None} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert violations(layer_of(path), imported_names(path.read_text(encoding="utf-8"), package)) == []


@pytest.mark.parametrize(
    ("layer", "source", "allowed"),
    [
        ("core", "import math, torch.nn.functional as F", True),
        ("core", "import numpy", False),
        ("core", "from lit_unlearn.diffusion import hooks", False),
        ("core", "def later():\n    from ..diffusion import hooks", False),
        ("core", "from . import alignment", True),
        ("data", "from lit_unlearn import evaluation", False),
        ("data", "from lit_unlearn import __version__", True),
        ("methods", "from lit_unlearn.data.concepts import Concept", True),
        ("methods", "from lit_unlearn.callbacks.export import export", False),
        ("evaluation", "from lit_unlearn.reports import tables", False),
        ("commands", "from lit_unlearn import cli", False),
        ("cli", "from lit_unlearn.commands import demo", True),
        ("methods", "import diffusers", False),
        ("methods", "import pytorch_lightning as pl", False),
        ("emoji", "from transformers import CLIPTextModel", True),
        ("emoji", "from lit_unlearn.methods import esd", False),
        ("callbacks", "from lit_unlearn.__main__ import main", False),
        (None, "from lit_unlearn.callbacks import export", True),
        (None, "from torchvision import transforms", False),
    ],
)
def test_a_violation_is_seen(layer: str | None, source: str, allowed: bool) -> None:
    package = f"lit_unlearn.{layer}" if layer else "lit_unlearn"
    assert (violations(layer, imported_names(source, package)) == []) is allowed


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_what_is_never_imported(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        libraries = {name.split(".")[0] for name in imported_names(path.read_text(encoding="utf-8"), folder)}
        assert not libraries & set(NEVER), path


# --- what only those know who take pipelines apart

PART_NAMES = {
    *("unet", "transformer", "vae", "scheduler", "tokenizer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("UNet2DConditionModel", "AutoencoderKL", "DDPMScheduler", "DDIMScheduler", "CLIPTextModel", "CLIPTokenizer"),
}
"""Names of the parts of a diffusers pipeline and of their classes: all others ask the pipeline."""


def parts_named(source: str) -> list[str]:
    """Lines of ``source`` that name a part, as an identifier or as a whole string; docstrings may name any."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        names: list[object] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.arg, ast.keyword)):
            names = [node.arg]
        elif isinstance(node, ast.alias):
            names = [*node.name.split("."), node.asname]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            names = [node.value]
        found += [f"line {node.lineno}: {name}" for name in names if name in PART_NAMES]  # type: ignore[attr-defined]
    return sorted(found)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if layer_of(path) not in PIPELINE_LAYERS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_who_takes_pipelines_apart_names_their_parts(path: Path) -> None:
    assert parts_named(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = unet(y)", ["unet"]),
        ("x = module.unet.config", ["unet"]),
        ("module.vae = None", ["vae"]),
        ("def encode(tokenizer): ...", ["tokenizer"]),
        ("encode = lambda *, text_encoder_2: 0", ["text_encoder_2"]),
        ("build(scheduler=None)", ["scheduler"]),
        ("from diffusers import DDIMScheduler", ["DDIMScheduler"]),
        ("import part as transformer", ["transformer"]),
        ("import package.vae.file", ["vae"]),
        ("def unet(): ...", ["unet"]),
        ("class CLIPTextModel: ...", ["CLIPTextModel"]),
        ("x: AutoencoderKL | None = None", ["AutoencoderKL"]),
        ("getattr(module, 'text_encoder_3')", ["text_encoder_3"]),
        ("x = parts['unet']['vae']", ["unet", "vae"]),
        ('"""unet"""', []),
        ('def f():\n    """unet"""', []),
        ('class C:\n    x = 0\n    """unet"""', []),
        ("x = name.startswith('unet.')  # unet", []),
        ("x = 'the unet'\nunets = unet_forwards = 0", []),
        ("x = f'{y}unet.'", []),
    ],
)
def test_a_part_that_is_named_is_seen(source: str, found: list[str]) -> None:
    assert [line.split(": ")[1] for line in parts_named(source)] == found


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "lightning", "diffusers", "transformers", "numpy"}
    code = f"import sys, lit_unlearn; print(sorted(set(sys.modules) & {heavy!r}), lit_unlearn.__version__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    loaded, version = result.stdout.split()
    assert loaded == "[]"
    assert version[0].isdigit()


METHODS = [path.stem for path in sorted((PACKAGE / "methods").glob("*.py")) if path.stem != "__init__"]


def chain(kind: type) -> int:
    """Classes of ours from ``kind`` upwards, itself included, along the longest way."""
    return 1 + max((chain(base) for base in kind.__bases__ if base.__module__.startswith("lit_unlearn")), default=0)


def test_chains_of_classes_are_counted() -> None:
    base = type("Base", (), {"__module__": "lit_unlearn.x"})
    between = type("Between", (base,), {"__module__": "lit_unlearn.x"})
    assert chain(type("Method", (between, type("Other", (), {})), {"__module__": "lit_unlearn.x"})) == 3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_read_in_four_classes(name: str) -> None:
    module = importlib.import_module(f"lit_unlearn.methods.{name}")
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
    assert all(chain(kind) <= 4 for kind in kinds if issubclass(kind, L.LightningModule))
