"""Scores, tables and picture grids of a ``test``, and the pictures of the unedited model, which are made only once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lit_unlearn.callbacks.folders import folder_of
from lit_unlearn.callbacks.judge_curve import JudgeCurve, draw_curves
from lit_unlearn.callbacks.sheets import Shown, evaluation_sheet
from lit_unlearn.data.prompts import PictureItem
from lit_unlearn.diffusion.compiled import is_compiled
from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.emoji.unedited import shipped_pictures
from lit_unlearn.evaluation.grids import Section, sheet
from lit_unlearn.evaluation.quality import PairedDrift, SetDistance, check_features, inception_features, of_bytes
from lit_unlearn.evaluation.scores import Cost, Drawn, Measurement, Relapse, Scores, Source
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.reports.tables import scores_table
from lit_unlearn.system.devices import device_name, float64_device
from lit_unlearn.system.kept_pictures import read_kept, save_kept
from lit_unlearn.system.pixels import save_png, to_pil

TEST_SCORES = (
    "forget",
    "retain",
    "harmonic_mean",
    "forget_direct",
    "forget_indirect",
    "forget_adversarial",
    "forget_crosswise",
    "spontaneous",
    "adjacent",
    "err",
)
"""Scores that a test logs before and after the edit."""


class UneditedPictures(L.Callback):
    """Keeps the pictures of the unedited model on disk, so that they are drawn only once to compare many edits.

    They lie in ``folder`` under a key of everything that determines them (``Drawing``: base weights, sampler, steps,
    precision, device, versions of libraries, ...), each with that key and a hash of its pixels in it. A file that is
    damaged, or of another key, is made anew. Those of the embedded model come with it, under the same key.

    Args:
        folder: Folder that keeps them.
    """

    def __init__(self, folder: str = "logs/unedited") -> None:
        self.folder = Path(folder).expanduser()
        self._key: str | None = None
        self._shipped: Mapping[str, Tensor] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._key = None  # another model, or another precision
        if isinstance(pl_module, DiffusionEditor):
            pl_module.known_pictures = self.unedited_pictures

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, DiffusionEditor):
            pl_module.known_pictures = None

    def unedited_pictures(self, module: ConceptEditor, batch: list[PictureItem]) -> Tensor:
        """Pictures (B, 3, H, W), uint8, of ``batch``: read if they exist, else generated and kept."""
        if self._key is None:
            self._key = self._make_key(module)
            self._shipped = self._read_shipped(self._key)
        paths = [self._path(module, item) for item in batch]
        shipped = [self._shipped.get(path.stem) for path in paths]
        pictures = [self._read(path) if known is None else known for path, known in zip(paths, shipped, strict=True)]
        missing = [place for place, picture in enumerate(pictures) if picture is None]
        if missing:
            # The whole batch is made again, since the last bits depend on it: an interrupted run must end like others.
            with module.unedited.restored():
                made = module.generate([item.prompt for item in batch], [item.seed for item in batch])
            for place in missing:
                image = to_pil(made[place].float() / 255)
                save_kept(paths[place], image, self._key)
                pictures[place] = made[place]
        return torch.stack([picture for picture in pictures if picture is not None])

    @staticmethod
    def _read_shipped(key: str) -> Mapping[str, Tensor]:
        if shipped := shipped_pictures(key):
            rank_zero_info(f"Pictures of the unedited model: {len(shipped)} come with the embedded model.")
        return shipped

    def _make_key(self, module: ConceptEditor) -> str:
        with module.unedited.restored():
            return Drawing.of(module.pipeline, module.num_inference_steps, module.guidance_scale).key

    def _path(self, module: ConceptEditor, item: PictureItem) -> Path:
        ids = module.pipeline.reader.ids([item.prompt, ""])  # the empty prompt is what guidance leads away from
        name = hashlib.sha256(f"{item.seed} {item.prompt} {ids}".encode()).hexdigest()[:24]
        assert self._key is not None
        return self.folder / self._key[:16] / f"{name}.png"

    def _read(self, path: Path) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            key, picture = read_kept(path)
            if key != self._key:
                raise ValueError("it holds another picture")
        except ValueError as error:
            rank_zero_info(f"{path} is damaged ({error}): it is made anew.")
            return None
        return picture


class EvaluationReport(L.Callback):
    """Writes the results of a ``test``: ``scores.json``, ``grid.png``, a table on the terminal, TensorBoard.

    Args:
        columns: Number of pictures in a row of the grid.
        others: Number of pictures of other concepts in the grid, besides those of the edited ones.
        features: Features for comparing the sets of other concepts' pictures (KID, FID): ``judge`` (if the judge has
            features), or ``inception`` (torch-fidelity's).
        judge_negatives: For the judge's precision and recall: number of pictures of each other concept of the same kind
            to judge with the edited concept's question. Null takes all pictures with a classifier, and with a slow
            judge omits precision and recall.

    Raises:
        ValueError: A field is wrong, or torch-fidelity is missing.
    """

    def __init__(
        self, columns: int = 10, others: int = 10, features: str = "judge", judge_negatives: int | None = None
    ) -> None:
        check_features(features)
        if judge_negatives is not None and judge_negatives < 0:
            raise ValueError(f"judge_negatives={judge_negatives} must be at least 0; 0 omits precision and recall.")
        self.columns, self.others = columns, others
        self.features, self.judge_negatives = features, judge_negatives
        self._shown: list[Shown] = []

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ConceptEditor)
        self._shown = []
        features = getattr(pl_module.judge, "features", None)
        device = float64_device(pl_module.device)  # these metrics sum up in float64
        self._drift = PairedDrift(features).to(device)
        compared = of_bytes(features) if features is not None else None
        if self.features == "inception":
            compared = inception_features(device)
        self._distance = SetDistance(compared, device) if compared is not None else None
        images_per_prompt = trainer.datamodule.images_per_prompt  # type: ignore[attr-defined]
        self._curve = JudgeCurve(
            pl_module.judge, pl_module.concepts, pl_module.every_edited, images_per_prompt, self.judge_negatives
        )
        self._curve.metric.to(pl_module.device)

    @override
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: list[PictureItem],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, ConceptEditor)
        names = list(pl_module.concepts.concepts)
        edited = {concept.name for concept in pl_module.every_edited}
        others = [place for place, item in enumerate(batch) if names[item.concept_index] not in edited]
        pair = [outputs[key][others] for key in ("before", "after")]
        self._drift.update(*(pictures.float() / 255 for pictures in pair))
        if self._distance is not None and others:
            self._distance.update(*pair)
        self._curve.update(outputs["before"], batch)
        kinds = ("before", "after", "shown_before", "shown_after")
        for item, *pair in zip(batch, *(outputs[kind] for kind in kinds), strict=True):
            is_edited = names[item.concept_index] in edited
            # The grid shows every prompt of the edited concepts and the first prompt of some others, once.
            if item.image_index == 0 and (is_edited or item.prompt_index == 0):
                self._shown.append(Shown(item, *pair))

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ConceptEditor)
        before, after = pl_module.before.compute(), pl_module.after.compute()  # every rank: they reduce
        drift: dict[str, float | None] = {**self._drift.compute()}  # these reduce too
        if self._distance is not None:
            drift |= self._distance.compute()
        curves = self._curve.compute()
        folder = folder_of(trainer)
        agreement = None
        if pl_module.second_judge is not None:
            agreement = {"judge": pl_module.second_judge.name, "cohen_kappa": float(pl_module.kappa.compute())}
        shown = [one for part in pl_module.processes.gathered(self._shown) for one in part]
        self._shown = sorted(shown, key=lambda one: one.item.seed)  # the order of a single process
        if not trainer.is_global_zero:
            return
        calibration = {name: curve.numbers() for name, curve in curves.items()}
        scores = self._scores(folder, trainer, pl_module, before, after, drift, agreement, calibration)
        scores.save(folder / "scores.json")
        grid = evaluation_sheet(pl_module, self._shown, scores, self.columns, self.others)
        save_png(folder / "grid.png", grid)
        for name in set(TEST_SCORES) & set(after):
            pl_module.log(f"test/{name}", after[name], rank_zero_only=True)
            pl_module.log(f"test/before/{name}", before[name], rank_zero_only=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_image("test/before_above_after", np.asarray(grid), 0, dataformats="HWC")
            self._log_hyperparameters(trainer.logger, pl_module, scores)
        draw_curves(trainer.logger, curves)
        Console().print(scores_table(scores.before, scores))
        rank_zero_info(f"Scores: {folder / 'scores.json'}\nPictures: {folder / 'grid.png'}")

    @staticmethod
    def _log_hyperparameters(logger: TensorBoardLogger, module: ConceptEditor, scores: Scores) -> None:
        """A row in TensorBoard's HParams table, which compares runs by their arguments and scores."""
        arguments: dict[str, bool | int | float | str] = {"method": scores.method, "edited": ", ".join(scores.edited)}
        for name, value in module.hparams.items():
            if not name.startswith("_") and name != "concept" and isinstance(value, bool | int | float | str):
                arguments[name] = value
        metrics = {f"test/{name}": getattr(scores, name) for name in ("forget", "retain", "harmonic_mean", "err")}
        logger.log_hyperparams(arguments, {name: value for name, value in metrics.items() if value is not None})

    def _scores(
        self,
        folder: Path,
        trainer: L.Trainer,
        module: ConceptEditor,
        before: dict[str, Any],
        after: dict[str, Any],
        drift: dict[str, float | None],
        agreement: dict[str, Any] | None,
        calibration: dict[str, Any],
    ) -> Scores:
        data = trainer.datamodule  # type: ignore[attr-defined]
        cost = module.current_cost()
        return Scores.from_metric(
            after,
            method=method_name(folder, module),
            backbone=Source(module.model_id, module.base_fingerprint),
            concepts=Source(module.concepts.name, module.concepts.sha256),
            edited=[concept.name for concept in module.every_edited],
            judge=module.judge.name,
            images_per_concept=module.after.images_per_concept,
            seed=data.seed,
            training_seed=module.hparams.get("seed"),
            before=Measurement.from_metric(before),
            cost=Cost(
                float(cost["seconds"]),
                int(cost["unet_forwards"]),
                int(cost["peak_memory_bytes"]) or None,
                int(cost.get("unet_backwards", 0)),
            ),
            edit={
                **module.report,
                "weight_change_ratio": module.unedited.change_ratio(),
                "weight_change_norm": module.unedited.change_norm(),
            },
            drift=drift or None,
            agreement=agreement,
            calibration=calibration or None,
            drawn=Drawn(
                device_name(module.device),
                str(trainer.precision),
                str(next(module.pipeline.denoiser.parameters()).dtype).removeprefix("torch."),
                module.num_inference_steps,
                module.guidance_scale,
                is_compiled(module.pipeline.denoiser),
            ),
            relapse=Relapse.of(module.earlier, after["per_concept"]),
        )


def method_name(folder: Path, module: ConceptEditor) -> str:
    """Name of the method's recipe, from the run's folder ``METHOD/CONCEPT/version_N``; otherwise the class name."""
    return folder.parents[1].name if folder.name.startswith("version_") else type(module).__name__


class EvaluationGrid(L.Callback):
    """Shows pictures in TensorBoard during a ``fit``: at its start, after every ``every_n_epochs``, and at its end.

    List it after the callback that edits, so that it shows the edited model.

    Args:
        every_n_epochs: Number of epochs between pictures; 0 shows only the start and the end.
        prompts: Prompts to show; null takes the first two direct and the first two indirect prompts of the edited
            concepts, and the first prompt of four other concepts.
        seed: Seed of each picture.
    """

    def __init__(self, every_n_epochs: int = 0, prompts: list[str] | None = None, seed: int = 0) -> None:
        self.every_n_epochs, self.prompts, self.seed = every_n_epochs, prompts, seed
        self._before: Tensor | None = None
        self._edited = 0  # so many of the prompts, the first ones, are of edited concepts

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ConceptEditor)
        if self.prompts is None:
            edited = pl_module.every_edited
            others = [concept for concept in pl_module.concepts.concepts.values() if concept not in edited]
            self.prompts = [p for concept in edited for p in (*concept.direct[:2], *concept.indirect[:2])]
            self._edited = len(self.prompts)
            self.prompts += [concept.direct[0] for concept in others[:: max(1, len(others) // 4)][:4]]
        with pl_module.unedited.restored():
            self._before = self._pictures(pl_module)
        self._show(trainer, pl_module, self._before)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ConceptEditor)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if (last or due) and self._before is not None:
            self._show(trainer, pl_module, self._pictures(pl_module))

    def _pictures(self, module: ConceptEditor) -> Tensor:
        assert self.prompts is not None
        prompts = self.prompts

        def make(places: list[int]) -> Tensor:
            return module.generate([prompts[place] for place in places], [self.seed + place for place in places])

        with _uncounted(module):
            return module.processes.made_once(len(prompts), make).cpu().float() / 255

    def _show(self, trainer: L.Trainer, module: ConceptEditor, after: Tensor) -> None:
        if not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        assert self.prompts is not None and self._before is not None
        names = ", ".join(concept.name for concept in module.every_edited)
        parts = {"Prompts of the recipe": slice(None)}
        if self._edited:
            parts = {f"Edited: {names}": slice(self._edited), "Other concepts": slice(self._edited, None)}
        sections = [Section(head, self._before[p], after[p], self.prompts[p]) for head, p in parts.items()]
        how = "Above: the unedited model; below: as the weights are now, with the same prompt and seed. Not judged."
        grid = sheet(f"{names} edited by {type(module).__name__}, after {trainer.global_step} steps", [how], sections)
        trainer.logger.experiment.add_image(
            "fit/before_above_after", np.asarray(grid), trainer.global_step, dataformats="HWC"
        )


@contextmanager
def _uncounted(module: ConceptEditor) -> Iterator[None]:
    """Do not count forwards inside the block, since drawing pictures to look at is not a cost of the edit."""
    counts = module.forwards.count, module.forwards.backward
    try:
        yield
    finally:
        module.forwards.count, module.forwards.backward = counts
