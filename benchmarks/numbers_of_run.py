"""Collects what ``same_numbers.py`` compares, hashes and scores of the files of runs, and finds differences of runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CLOCKS = ("seconds", "memory")
"""Fields of scores whose name contains one of these are left out."""
COUNTS = ("cost", "made", "forward_equivalents")
"""Fields for the amount of work, which is larger in an interrupted run."""
SOURCE = re.compile(rb'\n *"_name_or_path": [^\n]*')
"""Key in which diffusers writes the path that a model was loaded from into config.json: it depends on the checkout."""
SHOWN = 12
"""Number of differing values that are printed for each kind and run."""

Results = dict[str, dict[str, Any]]
"""Kind (weights, scores, ...) -> item -> hash or value."""


def checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the only run below ``folder``, relative to it."""
    found = sorted((folder / "logs").rglob("last.ckpt"))
    assert len(found) <= 1, found
    return found[0].relative_to(folder) if found else None


def sha256(*parts: bytes) -> str:
    """The first 16 digits of the SHA-256 of ``parts``."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def tensor_hash(tensor: Any) -> str:
    """Hash of the tensor's type, shape and bytes."""
    import torch

    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), content)


def file_hash(path: Path) -> str:
    """Hash of the file's content: its tensors, its pixels, or its bytes."""
    from PIL import Image
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        tensors = load_file(path)
        return sha256(*(f"{name} {tensor_hash(tensors[name])}".encode() for name in sorted(tensors)))
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return sha256(picture.mode.encode(), str(picture.size).encode(), picture.tobytes())
    return sha256(SOURCE.sub(b"", path.read_bytes()))


def leaves(content: Any, leave_out: Sequence[str], name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of a JSON file with its place, except in fields whose name contains a ``leave_out``."""
    if isinstance(content, dict | list) and content:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if not any(word in str(key) for word in leave_out):
                yield from leaves(value, leave_out, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def collect(folder: Path, leave_out: Sequence[str]) -> Results:
    """Collect everything below ``folder`` that must not change."""
    import torch

    result: Results = {kind: {} for kind in ("weights", "scores", "pictures", "exports")}
    run = checkpoint(folder)
    assert run is not None, f"no checkpoint in {folder}"
    state = torch.load(folder / run, weights_only=True, map_location="cpu")["state_dict"]
    result["weights"] = {name: tensor_hash(value) for name, value in state.items()}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top = name.split("/")[0]
        if not path.is_file() or name.startswith("logs/unedited/") or path.name in ("provenance.json", "README.md"):
            continue
        if path.suffix == ".png":
            result["pictures"][name] = file_hash(path)
        elif top == "logs" and path.suffix == ".json" and path.name != "run.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            result["scores"] |= {f"{path.name}: {key}": value for key, value in leaves(content, leave_out)}
        elif path.suffix == ".safetensors" or top in ("export", "checkpoints"):
            result["exports"][name] = file_hash(path)
    return result


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Items that differ or exist only in one of the two."""
    return [name for name in dict.fromkeys([*before, *after]) if before.get(name, ...) != after.get(name, ...)]


def total(values: dict[str, Any]) -> str:
    """One hash for all values of a kind."""
    return sha256(json.dumps(values, sort_keys=True).encode())


def report(before: dict[str, Results], after: dict[str, Results], failed: dict[str, str]) -> bool:
    """Print a table of runs, then the differences; return whether everything is equal."""
    kinds = list(dict.fromkeys(kind for results in [*before.values(), *after.values()] for kind in results))
    print(f"\n| run | {' | '.join(kinds)} |\n| --- |{' --- |' * len(kinds)}")
    details, equal = [], not failed
    for name in dict.fromkeys([*before, *after, *failed]):
        if name not in before or name not in after:
            cells = [f"FAILED: {failed[name]}" if name in failed else "new" if name in after else "GONE"]
            equal &= name not in before
        else:
            cells = []
            for kind in kinds:
                old, new = before[name].get(kind, {}), after[name].get(kind, {})
                size, names = len({**old, **new}), differing(old, new)
                lines = [f"  {item}: {old.get(item, 'not there')} -> {new.get(item, 'not there')}" for item in names]
                cells.append(f"DIFFERS, {len(lines)} of {size}" if lines else f"equal ({size})" if size else "")
                if lines:
                    equal = False
                    details.append(f"\n{name}: {kind}: {total(old)} -> {total(new)}")
                    details += lines[:SHOWN]
                    details += [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(details))
    print("\nEverything is equal." if equal else "\nNot everything is equal.")
    return equal
