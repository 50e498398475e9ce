"""Pictures: drawn by a model or an edit, and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_unlearn.api.edited import Edit
from lit_unlearn.system.errors import user_errors

if TYPE_CHECKING:
    from PIL import Image

    from lit_unlearn.diffusion.pipeline import Pipeline


def draw(
    model: Edit | Pipeline,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    num: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    scale: int = 1,
    device: str | None = None,
    offload: bool = False,
    torch_compile: bool = False,
) -> list[Image.Image]:
    """Draw prompts, as ``lit-unlearn generate`` does.

    Args:
        model: An edit, whose model is loaded for this call; or a pipeline that is loaded.
        prompts: One prompt, or several.
        seed: Seed of the first picture of each prompt; the next one has the next seed.
        num: Pictures of each prompt.
        num_inference_steps: Denoising steps; None for those of the edit's run, or 15 for a pipeline.
        guidance_scale: Strength of classifier-free guidance; None for that of the edit's run, or 4 for a pipeline.
        batch_size: Pictures drawn at once.
        scale: Each pixel is enlarged to ``scale`` x ``scale`` pixels, for small pictures.
        device: Of an edit: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for a GPU if there is one.
        offload: Of an edit: move parts to the GPU only while they are used.
        torch_compile: Draw with kernels that ``torch.compile`` makes: for many pictures, since the first ones take a
            minute longer. A pipeline draws so from then on.

    Returns:
        The pictures, RGB: all ``num`` of the first prompt, then of the next.

    Raises:
        UserError: An argument is wrong, memory ran out, or the pictures are not finite.
    """
    from PIL import Image

    from lit_unlearn.edits.drawing import draw_edit
    from lit_unlearn.system.names import check_numbers
    from lit_unlearn.system.pixels import to_pil

    wanted = [prompts] if isinstance(prompts, str) else list(prompts)
    with user_errors():
        if not wanted:
            raise ValueError("prompts is empty: give at least one.")
        check_numbers(scale=scale)
        if not isinstance(model, Edit) and (device is not None or offload):
            raise ValueError(
                "device and offload are for an edit: a pipeline is where it was loaded, so leave them out."
            )
    drawn = draw_edit(
        model.content if isinstance(model, Edit) else model,
        wanted,
        seed=seed,
        num=num,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        device=device,
        offload=offload,
        torch_compile=torch_compile,
    )
    pictures = [to_pil(picture) for picture in drawn.pictures]
    if scale == 1:
        return pictures
    return [one.resize((one.width * scale, one.height * scale), Image.Resampling.NEAREST) for one in pictures]


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Put pictures side by side into one, on white.

    Args:
        rows: Rows of pictures of the same size, such as those before and those after an edit.
        row_labels: One for each row, or none.
        column_labels: One for each column, such as its prompt, or none.
        scale: Enlargement; None to make each picture about 128 pixels wide.

    Raises:
        UserError: There are no pictures, their sizes differ, or the labels do not fit.
    """
    import torch

    from lit_unlearn.evaluation.grids import image_grid
    from lit_unlearn.system.pixels import to_tensor

    sizes = {picture.size for row in rows for picture in row}
    with user_errors():
        if len(sizes) > 1:
            raise ValueError(f"rows has pictures of the sizes {sorted(sizes)}: give pictures of one size.")
        width = min((size[0] for size in sizes), default=128)
        tensors = [torch.stack([to_tensor(picture) for picture in row]) for row in rows if row]
        return image_grid(tensors, row_labels, column_labels, max(1, round(128 / width)) if scale is None else scale)
