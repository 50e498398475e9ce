"""Pictures of the unedited embedded model, which come with it: a first test draws those of the edited model alone.

    lit-unlearn demo
    python -m lit_unlearn.emoji.unedited logs/unedited/KEY

packs the pictures that a test has kept in ``logs/unedited`` into one file in the model's folder. They are known by the
same key, of everything that determines a bit of them (``Drawing``): with other weights, settings, versions of libraries
or another processor they are not taken, and the test draws its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.diffusion.kept import PICTURES
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.source import EMBEDDED, resolve_model
from lit_unlearn.system.errors import UserError, user_errors
from lit_unlearn.system.files import atomic_write
from lit_unlearn.system.kept_pictures import read_kept

FILE = PICTURES
STEPS, GUIDANCE = 8, 4.0
"""How the recipes of the embedded model draw."""


def pack(folder: Path, output: Path, drawing: Drawing) -> int:
    """Write the pictures of ``folder``, a folder below ``logs/unedited``, into the file ``output``.

    Args:
        folder: The folder.
        output: The file; its metadata say how the pictures were drawn.
        drawing: How they must have been drawn.

    Returns:
        The number of pictures.

    Raises:
        ValueError: The folder holds no pictures, pictures that were drawn in another way, or damaged ones.
    """
    found = {path.stem: read_kept(path) for path in sorted(folder.glob("*.png"))}
    if {key for key, _ in found.values()} != {drawing.key}:
        raise ValueError(
            f"{folder} holds no pictures, or some that this version did not draw with the embedded model here: give "
            "the folder below logs/unedited that a test of now has made."
        )
    notes = {"key": drawing.key, "drawing": json.dumps(asdict(drawing))}
    with atomic_write(output) as file:
        file.write(save({name: picture for name, (_, picture) in found.items()}, notes))
    return len(found)


def shipped_pictures(key: str, path: Path | None = None) -> dict[str, Tensor]:
    """Pictures (3, H, W), uint8, by the stem of the file that a test would keep them in; none if drawn otherwise.

    Args:
        key: Key of how they must have been drawn.
        path: The file; by default that of the embedded model.
    """
    path = path or Path(resolve_model(EMBEDDED), FILE)
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        rank_zero_info(f"{path} is damaged ({error}): its pictures are drawn anew.")
        return {}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder below logs/unedited")
    options = parser.parse_args(args)
    try:
        with user_errors():
            output = Path(resolve_model(EMBEDDED), FILE)
            drawing = Drawing.of(load_pipeline(EMBEDDED), STEPS, GUIDANCE)
            print(f"{output}: {pack(options.folder, output, drawing)} pictures.")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
