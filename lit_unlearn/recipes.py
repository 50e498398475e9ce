"""Where recipes are: a bare name such as ``null_space.yaml`` is looked up here and in the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lit_unlearn.errors import UserError, closest


def recipe_folders() -> list[Path]:
    """Folders that hold recipes, the first to be searched first: ``configs`` here, then what ships with the package."""
    package = Path(str(files("lit_unlearn")))
    shipped = package / "configs"
    if not shipped.is_dir() and (package.parent / "pyproject.toml").is_file():
        shipped = package.parent / "configs"  # installed in editable mode: they lie at the top of the tree
    return [folder for folder in (Path("configs"), shipped) if folder.is_dir()]


def recipe_names() -> list[str]:
    """Names of all recipes, as ``find_recipe`` takes them, e.g. ``emoji/judge.yaml``."""
    names = [path.relative_to(folder).as_posix() for folder in recipe_folders() for path in folder.rglob("*.yaml")]
    return sorted(set(names), key=lambda name: (name.count("/"), name))


def find_recipe(name: str) -> Path:
    """Return the file that ``name`` stands for.

    Args:
        name: A path, or a name relative to one of ``recipe_folders``; the ending ``.yaml`` may be left out.

    Raises:
        UserError: There is no such file, or it is not YAML.
    """
    for candidate in (name, f"{name}.yaml") if not Path(name).suffix else (name,):
        for path in (Path(candidate), *(folder / candidate for folder in recipe_folders())):
            if path.is_file():
                _check_yaml(path)
                return path
    known = recipe_names()
    remedy = closest(name, known) or f" (recipes: {', '.join(known)})"
    raise UserError(f"There is no recipe {name!r}{remedy}.")


def resolve_recipes(args: Sequence[str]) -> list[str]:
    """Return the arguments with the value of every ``--config`` replaced by the path of its recipe.

    Raises:
        UserError: A recipe is missing.
    """
    resolved: list[str] = []
    for arg in args:
        joined = re.fullmatch(r"(--config|-c)=(.*)", arg, flags=re.DOTALL)
        if resolved and resolved[-1] in ("--config", "-c"):
            resolved.append(str(find_recipe(arg)))
        elif joined:
            resolved.append(f"{joined[1]}={find_recipe(joined[2])}")
        else:
            resolved.append(arg)
    return resolved


def _check_yaml(path: Path) -> None:
    """Refuse a file that is not a mapping in YAML: the parser of the arguments would not say which file it was."""
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe {path} is not text ({error.reason}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"The recipe {path} is not valid YAML: {getattr(error, 'problem', error)}{where}.") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"The recipe {path} holds no keys such as 'model' and 'data': is it the right file?")
