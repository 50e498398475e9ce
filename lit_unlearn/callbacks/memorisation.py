"""Reports copies and drift of a ``test`` of data unlearning: ``memorisation.json``, ``grid.png``, TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.callbacks.modules import expect_module
from lit_unlearn.data.images import CaptionItem, load_image
from lit_unlearn.evaluation.memorisation import copies_grid
from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.system.json_files import write_json
from lit_unlearn.system.pixels import save_png

SCHEMA = 1
FILE = "memorisation.json"


class MemorisationReport(L.Callback):
    """Writes the results of a ``test`` of data unlearning.

    Args:
        columns: Number of pictures of captions to forget in the grid.
        others: Number of pictures of other captions in the grid.
    """

    def __init__(self, columns: int = 12, others: int = 4) -> None:
        for field, value in {"columns": columns, "others": others}.items():
            if value < 0 or (field == "columns" and value == 0):
                raise ValueError(f"MemorisationReport.{field}={value} is too small.")
        self.columns, self.others = columns, others
        self._limits = {"forget": columns, "keep": others}
        self._shown: dict[str, list[tuple[CaptionItem, dict[str, Tensor]]]] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        expect_module(self, pl_module, DataUnlearning, "reports on data unlearning")

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown = {"forget": [], "keep": []}

    @override
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: list[CaptionItem],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, DataUnlearning)
        # As many pictures of each caption to forget as fit in the grid.
        each = max(1, self.columns // len(pl_module.images.forget_captions))
        for place, item in enumerate(batch):
            wanted = item.image_index < (each if item.kind == "forget" else 1)
            if wanted and len(self._shown[item.kind]) < self._limits[item.kind]:
                self._shown[item.kind].append((item, {name: value[place] for name, value in outputs.items()}))

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DataUnlearning)
        before, after = pl_module.before.compute(), pl_module.after.compute()  # every rank: they reduce
        folder = folder_of(trainer)  # on every rank too
        parts = pl_module.processes.gathered(self._shown)
        for kind, limit in self._limits.items():  # in the order of a single process
            shown = [one for part in parts for one in part[kind]]
            self._shown[kind] = sorted(shown, key=lambda one: one[0].number)[:limit]
        if not trainer.is_global_zero:
            return
        write_json(folder / FILE, self._content(folder, pl_module, before, after))
        grid = self._grid(pl_module)
        save_png(folder / "grid.png", grid)
        for prefix, result in (("test/before", before), ("test", after)):
            for kind in ("forget", "keep"):
                for space in pl_module.detector.spaces:
                    if kind in result:
                        pl_module.log(
                            f"{prefix}/{kind}/copies_{space}", result[kind][space]["copies"], rank_zero_only=True
                        )
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_image("test/before_and_after", np.asarray(grid), 0, dataformats="HWC")
        Console().print(copies_table(before, after, list(pl_module.detector.spaces)))
        rank_zero_info(f"Copies: {folder / FILE}\nPictures: {folder / 'grid.png'}")

    def _content(
        self, folder: Path, module: DataUnlearning, before: dict[str, Any], after: dict[str, Any]
    ) -> dict[str, Any]:
        data = module.images
        return {
            "schema": SCHEMA,
            "method": folder.parent.name if folder.name.startswith("version_") else type(module).__name__,
            "backbone": {"name": module.model_id, "sha256": module.base_fingerprint},
            "images": data.identity,
            "forget": [{"file": image.path.as_posix(), "caption": image.caption} for image in data.forget],
            "judge": module.judge.name if "features" in module.detector.spaces else None,
            "copy_quantile": module.copy_quantile,
            "thresholds": module.detector.thresholds,
            "images_per_prompt": data.images_per_prompt,
            "seed": data.seed,
            "before": before,
            "after": after,
            "cost": module.current_cost(),
            "edit": module.report,
        }

    def _grid(self, module: DataUnlearning) -> Image.Image:
        shown = self._shown["forget"] + self._shown["keep"]
        size, forget = module.pipeline.picture_size, module.images.forget

        def generated(name: str) -> Tensor:
            return torch.stack([pictures[name] for _, pictures in shown]).float() / 255

        def nearest(name: str) -> Tensor:
            return torch.stack([load_image(forget[int(pictures[name])].path, size) for _, pictures in shown])

        return copies_grid(
            generated("before"),
            nearest("nearest_before"),
            generated("after"),
            nearest("nearest_after"),
            [item.prompt for item, _ in shown],
        )


def copies_table(before: dict[str, Any], after: dict[str, Any], spaces: list[str]) -> Table:
    """Table that a test prints: shares of copies with 95 % intervals, and how much pictures have changed."""
    table = Table(title="Copies of the pictures to forget", title_justify="left", header_style="bold", box=HORIZONTALS)
    table.add_column("captions")
    for header in ("before", "after"):
        table.add_column(header, justify="right", no_wrap=True)
    for kind in ("forget", "keep"):
        if kind not in after:
            continue
        count = after[kind]["pictures"]
        for space in spaces:
            cells = []
            for result in (before, after):
                low, high = result[kind][space]["interval"]
                cells.append(f"{result[kind][space]['copies']:.3f} ({low:.2f}-{high:.2f})")
            table.add_row(f"to {kind}, in {space}, {count} pictures", *cells)
        table.add_row(f"to {kind}, same-seed change", "", f"{after[kind]['drift']:.3f}", end_section=True)
    return table
