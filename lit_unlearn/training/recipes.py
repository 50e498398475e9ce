"""Finds recipes: a plain name such as ``null_space.yaml`` is looked up in ``./configs`` and in the package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path, PurePosixPath

from lit_unlearn.diffusion.source import SHIPPED
from lit_unlearn.system.errors import UserError, closest
from lit_unlearn.system.names import why_not

MAX_BYTES, MAX_NODES = 1_000_000, 100_000
"""Size limit of a recipe in bytes, and limit of its number of values after its aliases are expanded."""


OLD_CALLBACKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "NullSpaceEdit": ("NullSpace", ()),
    "LeastSquaresEdit": ("LeastSquares", ()),
    "UCEEdit": ("RidgeMap", ("erase_scale", "preserve_scale", "lamb")),
    "SPEEDEdit": (
        "RefinedNullSpace",
        ("threshold", "rule", "minimum", "retain_scale", "lamb", "filter", "augment"),
    ),
}
"""Callbacks of earlier versions: the solver that replaced each, and the method's arguments that moved to the solver."""


def recipe_folders() -> list[Path]:
    """Folders with recipes, in the order of the search: ``./configs``, then the folder in the package."""
    package = Path(str(files("lit_unlearn")))
    shipped = package / "configs"
    if not shipped.is_dir() and (package.parent / "pyproject.toml").is_file():
        shipped = package.parent / "configs"  # in an editable install they are at the top of the repository
    return [folder for folder in (Path("configs"), shipped) if folder.is_dir()]


def recipe_names() -> list[str]:
    """Names of all recipes, as ``find_recipe`` takes them, e.g. ``emoji/judge.yaml``."""
    names = [path.relative_to(folder).as_posix() for folder in recipe_folders() for path in folder.rglob("*.yaml")]
    return sorted(set(names), key=lambda name: (name.count("/"), name))


def recipe_summary(name: str) -> str:
    """The first sentence of the comment at the top of a recipe, without citations."""
    for path in (folder / name for folder in recipe_folders()):
        if not path.is_file():
            continue
        words = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.startswith("#") or not line.strip("# "):
                break
            words.append(line.strip("# "))
        without_citations = re.sub(r"\s*\([^()]*(?:\d{4}|Eq)[^()]*\)", "", " ".join(words))
        return re.split(r"(?<=[a-z)\d])\.(?= [A-Z]|$)", without_citations)[0]
    return ""


def find_recipe(name: str) -> Path:
    """Return the file that ``name`` stands for.

    Args:
        name: A path, or a name relative to one of ``recipe_folders``; ``.yaml`` may be left out.

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
    """Return the arguments with the recipes first, each ``--config`` followed by the path of its file.

    Options then override recipes wherever they stand, and can set keys that only a recipe has, such as
    ``--edit.ridge``. Options of ``LISTS`` that are given several times form one list; of others the last counts.
    ``--model PLACE``, with a folder, a file or a hub id instead of a class, is short for ``--model.model PLACE``, and
    ``--config_folder`` for ``--model.config_folder``.

    Raises:
        UserError: A recipe is missing, or a list cannot be read.
    """
    recipes: list[str] = []
    options: list[str] = []
    left = iter(args[1:])
    for arg in left:
        joined = re.fullmatch(r"(--config|-c)=(.*)", arg, flags=re.DOTALL)
        if joined:
            recipes.append(f"{joined[1]}={find_recipe(joined[2])}")
        elif arg in ("--config", "-c"):
            if (name := next(left, None)) is None:
                raise UserError(f"{arg} is the last word: name a recipe behind it, e.g. --config null_space.yaml.")
            recipes += [arg, str(find_recipe(name))]
        else:
            options.append(arg)
    options = _named_models(options)
    for name in LISTS:
        options = _joined_lists(options, name)
    return [*args[:1], *recipes, *options]


def _named_models(options: Sequence[str]) -> list[str]:
    """Replace ``--model`` by ``--model.model`` in ``options`` where its value is a place and not a class.

    ``--config_folder`` becomes ``--model.config_folder``.
    """
    found: list[str] = []
    for arg in options:
        if found and found[-1] == "--model" and _is_place(arg):
            found[-1] = "--model.model"
        elif arg.startswith("--model=") and _is_place(arg.partition("=")[2]):
            arg = f"--model.model={arg.partition('=')[2]}"
        elif arg == "--config_folder" or arg.startswith("--config_folder="):
            arg = arg.replace("--", "--model.", 1)
        found.append(arg)
    return found


def _is_place(model: str) -> bool:
    """Whether ``model`` is a folder, a hub id, a file or an embedded model, and not the import path of a class."""
    return model in SHIPPED or model[:1] in ("~", ".") or "/" in model or "\\" in model or Path(model).exists()


LISTS = ("--concept", "--after", "--base_edit")
"""Options that can be given several times."""


def _joined_lists(options: Sequence[str], name: str) -> list[str]:
    """Replace several options ``name`` by one with a list.

    Raises:
        UserError: An option has no value, or a list cannot be read.
    """
    given: list[str] = []
    others: list[str] = []
    left = iter(options)
    for arg in left:
        if arg.startswith(f"{name}="):
            given.append(arg.partition("=")[2])
        elif arg == name:
            value = next(left, "--")
            if value.startswith("--"):
                raise UserError(f"{name} has no value: write it behind the option, as in {name} VALUE or {name}=VALUE.")
            given.append(value)
        else:
            others.append(arg)
    is_list = any(value.startswith("[") for value in given)
    if len(given) < 2 and not is_list:
        return list(options)
    import yaml

    lists = [read_list(name, value) if value.startswith("[") else [value] for value in given]
    values = [value for values in lists for value in values]
    return [name, yaml.safe_dump(values, default_flow_style=True, width=10_000, allow_unicode=True).strip(), *others]


def read_list(option: str, text: str) -> list[str]:
    """The entries of a list on the command line, such as ``[dog, cat]``; each is text, whatever it looks like.

    Raises:
        UserError: It is not a list of texts.
    """
    import yaml

    try:
        found = yaml.load(text, Loader=yaml.BaseLoader)  # makes nothing but text, lists and mappings
    except (yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise UserError(
            f"{option}={text} cannot be read as a list: close its brackets, and put names with # @ : or \\ in single "
            f"quotation marks, as in {option} \"['A', 'B']\"."
        )
    if wrong := [entry for entry in found if not isinstance(entry, str)]:
        raise UserError(f"{option}={text}: {wrong[0]} is not a name: a list holds names only, as in {option} '[A, B]'.")
    return found


@contextmanager
def utf8_recipes() -> Iterator[None]:
    """Within the block, the parser reads recipes as UTF-8.

    jsonargparse opens files in the system's encoding, which is not UTF-8 on Windows, and has no option for this.
    """
    from jsonargparse import Path as ParserPath

    name = "read_text" if hasattr(ParserPath, "read_text") else "get_content"  # before jsonargparse 4.49
    before = getattr(ParserPath, name)

    def read(path: ParserPath, *options: str) -> str:
        file = Path(path.absolute)
        return file.read_text(encoding="utf-8") if file.is_file() else before(path, *options)

    setattr(ParserPath, name, read)
    try:
        yield
    finally:
        setattr(ParserPath, name, before)


def check_method(method: str | None) -> None:
    """Refuse a method's name that leads to another folder, or that some operating systems do not allow.

    Runs are kept in ``default_root_dir/METHOD``.

    Raises:
        UserError: The name is not allowed.
    """
    parts = PurePosixPath(method or "").parts
    if {"..", "/"} & set(parts):
        raise UserError(f"method={method!r} leads out of the folder of the runs: give a name, such as esd.")
    for part in parts:
        if reason := why_not(part):
            raise UserError(f"method={method!r} {reason}, which Windows does not allow: give a name, such as esd.")


def _check_yaml(path: Path) -> None:
    """Refuse a file that is not a mapping in YAML, because the parser's own message does not name the file."""
    import yaml

    from lit_unlearn.system.strict_yaml import expanded_size

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"The recipe {path} is larger than {MAX_BYTES:,} bytes: is it the right file?")
        node = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
        nodes = expanded_size(node)
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe {path} is not text ({error.reason}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"The recipe {path} is not valid YAML: {getattr(error, 'problem', error)}{where}.") from error
    except RecursionError as error:
        raise UserError(f"The recipe {path} is nested too deeply, or holds itself.") from error
    if nodes > MAX_NODES:
        raise UserError(f"The recipe {path} stands for more than {MAX_NODES:,} values by its aliases: write them out.")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"The recipe {path} holds no keys such as 'model' and 'data': is it the right file?")
    _refuse_old_callbacks(path, content.decode())


def _refuse_old_callbacks(path: Path, text: str) -> None:
    """Refuse a recipe of an earlier version, in which closed forms were callbacks, and show its new form."""
    import yaml

    if not any(old in text for old in OLD_CALLBACKS):
        return
    content = yaml.safe_load(text)
    trainer, model = (content.get(key) if isinstance(content.get(key), dict) else {} for key in ("trainer", "model"))
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = str(callback.get("class_path") if isinstance(callback, dict) else callback).rpartition(".")[2]
        if name in OLD_CALLBACKS:
            solver, moved = OLD_CALLBACKS[name]
            given = dict(callback.get("init_args") or {}) if isinstance(callback, dict) else {}
            given |= {k: v for k, v in (model.get("init_args") or {}).items() if k in moved}
            new = yaml.safe_dump({"class_path": solver, "init_args": given}, default_flow_style=True, width=10_000)
            from_model = f", and {', '.join(moved)} out of model" if moved else ""
            raise UserError(
                f"The recipe {path} is of an earlier version: take {name} out of trainer.callbacks{from_model}, "
                f"and write `edit: {new.strip()}` instead."
            )
