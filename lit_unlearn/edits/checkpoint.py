"""Reads, checks and applies the edited weights of a run (``.ckpt``) or an export (``.safetensors``)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_unlearn.data.concepts import ConceptSet
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.clip_skip import is_number
from lit_unlearn.diffusion.parameters import PretrainedValues, fingerprint
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.public_name import hub_snapshot
from lit_unlearn.diffusion.source import STEMS
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.edits.archives import UNPICKLING_ERRORS, load_archive
from lit_unlearn.edits.chain import Link, chain_of_checkpoint, chain_of_delta, split_weights
from lit_unlearn.edits.older import in_todays_terms
from lit_unlearn.methods.shared.stack import CHECKPOINT_KEY
from lit_unlearn.system.errors import warn
from lit_unlearn.system.names import is_text
from lit_unlearn.system.run_file import unfinished

DELTA_FIELDS = ("method", "concepts", "base_model", "base_fingerprint", "config")
"""Fields of a delta's metadata that are required for reading it; each is JSON text."""
LARGEST_STEPS, LARGEST_GUIDANCE = 1000, 1_000_000
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHT_NAME = re.compile(rf"({'|'.join(STEMS)})(\.\w+)+", flags=re.ASCII)


@dataclass(frozen=True)
class Edit:
    """An edit: its new weights, the method that made it, and the model that it belongs to.

    Attributes:
        path: The file.
        method: Name of the method's class.
        concepts: Names of the edited concepts.
        model: The base model as the run named it: a folder or a hub id.
        base_fingerprint: Hash of the edited weights' values in the base model.
        weights: New values by full parameter name.
        hyper_parameters: Arguments of the method.
        base_weights: SHA-256 of all weights of each part of the base model, as ``WholeModel.sha256``, if known.
        concept_set_sha256: Hash of the concept set, if known.
        edit: The solver and its settings, if a closed form computed the weights.
        recipe: The part of the recipe that determines the fit's result, if known.
        concept_set: The content of the concept set, as in its file, if known.
        version: Version of lit-unlearn that made it, if known.
        chain: What made the weights, if several edits did, the first one first (``lit_unlearn.edits.chain``).
        overwritten: Values that a later one of them has replaced, by ``NUMBER/NAME``.

    Raises:
        ValueError: A field has the wrong type, or a weight is not a tensor of finite floats; no file is trusted.
    """

    path: Path
    method: str
    concepts: list[str]
    model: str
    base_fingerprint: str
    weights: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    base_weights: Mapping[str, str] = field(default_factory=dict)
    concept_set_sha256: str | None = None
    edit: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    concept_set: dict[str, Any] | None = None
    version: str | None = None
    chain: Sequence[Link] = ()
    overwritten: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def refuse(what: str, source: str = "version") -> ValueError:
            return ValueError(
                f"ckpt_path={self.path} is no valid edit ({what}): the file is damaged or from another {source}; get "
                "it from its author again, or run the fit again."
            )

        for name in ("method", "model", "base_fingerprint"):
            value = getattr(self, name)
            if not is_text(value) or (name != "model" and not value.isprintable()):  # a folder may have any name
                raise refuse(f"its {name} is not text")
        if not isinstance(self.concepts, list) or not all(map(is_text, self.concepts)):
            raise refuse("its concepts are no list of names")
        for name in ("edit", "recipe", "concept_set"):
            if not isinstance(getattr(self, name), dict | None):
                raise refuse(f"its {name} is no mapping")
        if not isinstance((self.recipe or {}).get("model"), dict | None):
            raise refuse("the model of its recipe is no mapping")
        options = self.hyper_parameters
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise refuse("its config is no mapping")
        if getattr(torch, str(options.get("dtype", "float32")), None) not in DTYPES:
            raise refuse(f"its dtype is {options['dtype']!r:.40}")
        steps = options.get("num_inference_steps", 1)
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= LARGEST_STEPS:
            raise refuse(f"its num_inference_steps is {steps!r:.40}, not a whole number from 1 to {LARGEST_STEPS}")
        scale = options.get("guidance_scale", 1)
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) <= LARGEST_GUIDANCE:
            raise refuse(f"its guidance_scale is {scale!r:.40}, not a number of up to {LARGEST_GUIDANCE:,}")
        for name in ("version", "concept_set_sha256"):
            if not isinstance(getattr(self, name), str | None):
                raise refuse(f"its {name} is not text")
        for name in ("revision", "config_folder", "concept_set", "judge"):
            if not isinstance(options.get(name), str | None):
                raise refuse(f"its {name} is not text")
        if not isinstance(options.get("judge_options"), dict | None):
            raise refuse("its judge_options are no mapping")
        if not is_number(self.clip_skip):
            what = f"its clip_skip is {self.clip_skip!r:.40}, and possible is a whole number of at least 1, or none"
            raise refuse(what, "model")
        hashes = self.base_weights
        if not isinstance(hashes, dict) or not set(hashes) <= set(STEMS) or not all(map(is_text, hashes.values())):
            raise refuse("its base weights are no mapping of parts")
        for name, value in self.weights.items():
            if not isinstance(name, str) or not WEIGHT_NAME.fullmatch(name):
                raise refuse(f"{name!r:.100} is no name of a weight")
            if not isinstance(value, Tensor) or value.dtype not in DTYPES or not value.isfinite().all():
                raise refuse(f"{name} does not hold finite numbers")

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run that the file belongs to, or None."""
        return run_folder(self.path)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base model's weights when it was edited."""
        return getattr(torch, self.hyper_parameters.get("dtype", "float32"))

    @property
    def clip_skip(self) -> int | None:
        """Layers that prompts are read earlier, in its fit and in all pictures of it; None for none."""
        return self.hyper_parameters.get("clip_skip")

    def check_weights(self) -> None:
        """Refuse an edit that changes nothing.

        Raises:
            ValueError: It edits no weight, or every weight is bit for bit the same as in the base model.
        """
        if not self.weights:
            raise ValueError(f"{self.path} edits no weight of the model: {self.method} leaves it as it is.")
        if fingerprint({name: value.to(self.dtype) for name, value in self.weights.items()}) == self.base_fingerprint:
            raise ValueError(
                f"{self.path} changes nothing: all {len(self.weights)} weights that it edits are those of "
                f"{self.model!r} bit for bit, so fit again with a larger edit."
            )

    def check_set(self, concepts: ConceptSet) -> None:
        """Refuse a concept set that the edit was not made with; warn if the edit does not name its concept set.

        Raises:
            ValueError: The edit was made with another set, or the content of the set has changed.
        """
        if self.concept_set_sha256 is None:
            rank_zero_warn(
                f"{self.path} does not say which concept set it was made with: {concepts.name!r} is taken for it."
            )
            return
        concepts.check_same(str(self.path), self.concept_set_sha256, (self.concept_set or {}).get("name"))

    def check_base(self, base: BaseModel) -> None:
        """Refuse a base model that the edit was not made on; only its edited weights are read.

        If a model of the hub is not downloaded yet, only its name is compared.

        Raises:
            ValueError: The edit was made on another model.
        """
        if base.folder is None:
            same = base.name == (hub_snapshot(self.model) or (self.model,))[0]
        else:
            same = base.fingerprint(self.weights, self.dtype) == self.base_fingerprint
        if not same:
            raise ValueError(
                f"{self.path} edits {self.model!r} and does not fit model={base.name!r}, whose weights differ: "
                "use the model that it was made on."
            )

    def check_whole(self, base: BaseModel, loaded: Pipeline | None = None) -> None:
        """Refuse a base model that differs in a part which the edit does not change.

        Args:
            base: The base model.
            loaded: Its pipeline in ``dtype``, if it is loaded and not edited: it is hashed instead of the files.

        Raises:
            ValueError: Some parts differ; the message names them.
        """
        if self.base_weights:
            self._check_parts(base.sha256(self.dtype, loaded), base.name)

    def _check_parts(self, found: Mapping[str, str], model: str) -> None:
        if other := [part for part, sha256 in self.base_weights.items() if found.get(part) != sha256]:
            raise ValueError(
                f"{self.path} edits {self.model!r} and does not fit model={model!r}, whose {' and '.join(other)} "
                f"{'differs' if len(other) == 1 else 'differ'}: use the model that it was made on."
            )

    @torch.no_grad()
    def apply(self, pipeline: Pipeline, base: BaseModel | None = None) -> None:
        """Write the edited weights into the loaded pipeline.

        Args:
            pipeline: The base model's pipeline.
            base: The model that it was loaded from, if known: weights with known hashes are not hashed again.

        Raises:
            ValueError: A weight is missing in the pipeline or has another shape, or the edit was made on another model.
        """
        parameters = pipeline.named_parameters()
        for name, value in self.weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(
                    f"{self.path} edits {name} of shape {tuple(value.shape)}, which the model does not have."
                )
        before = {name: parameters[name] for name in self.weights}
        found = base.fingerprint(before, self.dtype, before) if base else fingerprint(before)
        if found != self.base_fingerprint:
            raise ValueError(f"{self.path} edits {self.model!r}, which has other weights than the loaded model.")
        if base is not None:
            self.check_whole(base, pipeline)
        elif self.base_weights:
            self._check_parts(WholeModel.loaded(pipeline).sha256(), "the loaded one")
        for name, value in self.weights.items():
            parameters[name].copy_(value)


def run_folder(ckpt_path: str | Path) -> Path | None:
    """Folder of the run that a checkpoint belongs to (``RUN/checkpoints/last.ckpt``); None if it lies elsewhere."""
    parent = Path(ckpt_path).absolute().parent
    return Path(ckpt_path).parent.parent if parent.name == "checkpoints" else None


def warn_unfinished(ckpt_path: str | Path) -> None:
    """Say that the run of a checkpoint is not finished, if it is not."""
    folder = run_folder(ckpt_path)
    if folder is not None and (state := unfinished(folder)) is not None:
        warn(f"{folder} {state}; its edit is that of the last checkpoint.")


def newest_checkpoint(folder: Path) -> Path | None:
    """The ``last.ckpt`` of the newest run among ``folder/version_N``, or None."""
    found = {path.parts[-3].removeprefix("version_"): path for path in folder.glob("version_*/checkpoints/last.ckpt")}
    versions = [version for version in found if version.isdigit()]
    return found[max(versions, key=int)] if versions else None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of Lightning without running code that it may contain.

    Raises:
        ValueError: The file is missing or corrupt.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"ckpt_path={path} is a folder: give the file, e.g. {path / 'checkpoints' / 'last.ckpt'}.")
    if not path.is_file():
        raise ValueError(f"ckpt_path={path} does not exist: `lit-unlearn fit` writes logs/.../checkpoints/last.ckpt.")
    corrupt = f"ckpt_path={path} is corrupt or no checkpoint"
    try:
        checkpoint = load_archive(path)
    except UNPICKLING_ERRORS as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{corrupt} ({reason}): copy it again, or run the fit again.") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{corrupt}: it has no state_dict.")
    return checkpoint


def _listed(value: Any) -> Any:
    """``value`` as a list; a text, which only a damaged file has, as it is, so that it is refused by its name."""
    return value if isinstance(value, str) else list(value)


def read_edit(path: str | Path) -> Edit:
    """Read the checkpoint of a run, or an exported delta.

    Raises:
        ValueError: The file is missing, corrupt, or not made by lit-unlearn.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_delta(path)
    checkpoint = load_checkpoint(path)
    state = checkpoint["state_dict"]
    try:
        ours: dict[str, Any] = checkpoint[CHECKPOINT_KEY]
        weights = {name: state[name] for name in ours["edited_names"]}
        given = {k: v for k, v in checkpoint["hyper_parameters"].items() if k != "_instantiator"}
        arguments, solver = in_todays_terms(ours["method"], given, ours.get("edit"))
        return Edit(
            path=path,
            method=ours["method"],
            concepts=_listed(ours["concepts"]),
            model=ours["model"],
            base_fingerprint=ours["base_fingerprint"],
            weights=weights,
            hyper_parameters=arguments,
            concept_set_sha256=ours.get("concept_set_sha256"),
            edit=solver,
            recipe=ours.get("recipe"),
            concept_set=ours.get("concept_set"),
            version=ours.get("version"),
            **chain_of_checkpoint(path, ours, weights, arguments, solver),
        )
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"ckpt_path={path} was not made by an edit of lit-unlearn: it does not say what it edits."
        ) from error


def _read_delta(path: Path) -> Edit:
    if not path.is_file():
        raise ValueError(f"ckpt_path={path} does not exist: `lit-unlearn export --delta` writes such a file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied, because tensors mapped from the file would prevent Windows from replacing it.
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, *UNPICKLING_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"ckpt_path={path} is corrupt ({reason:.200}): copy it again.") from error
    weights, replaced = split_weights(found)
    try:
        facts = {name: json.loads(metadata[name]) for name in DELTA_FIELDS}
        names = ("base_sha256", "concept_set_sha256", "edit", "recipe", "concept_set", "version", "chain")
        optional = {name: json.loads(metadata.get(name, "null")) for name in names}
    except KeyError as error:
        raise ValueError(
            f"ckpt_path={path} was not made by `lit-unlearn export --delta`: it lacks {error!s:.100}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ckpt_path={path} is corrupt (metadata: {error!s:.100}): copy it again.") from error
    if metadata.get("kind") == '"lora"':
        raise ValueError(
            f"ckpt_path={path} holds LoRA weights, for diffusers and other programs: give the run's checkpoint, or a "
            "file of `lit-unlearn export --delta`."
        )
    for name, value, kind in (("config", facts["config"], dict), ("edit", optional["edit"], dict | None)):
        if not isinstance(value, kind):
            raise ValueError(
                f"ckpt_path={path} is no valid edit (its {name} is no mapping): get it from its author again."
            )
    arguments, solver = in_todays_terms(str(facts["method"]), facts["config"], optional["edit"])
    return Edit(
        path,
        facts["method"],
        facts["concepts"],
        facts["base_model"],
        facts["base_fingerprint"],
        weights,
        arguments,
        optional["base_sha256"] or {},
        optional["concept_set_sha256"],
        solver,
        optional["recipe"],
        optional["concept_set"],
        optional["version"],
        **chain_of_delta(path, optional["chain"], replaced, weights, facts["concepts"]),
    )


def load_edited(base: BaseModel, edit: Edit | None, device: torch.device | None = None) -> Pipeline:
    """Load the pipeline of ``base`` onto ``device`` (as for ``load_pipeline``) and apply ``edit``, if there is one.

    Raises:
        ValueError: The model cannot be loaded, or the edit does not fit it.
    """
    return load_with_pretrained(base, edit, device)[0] if edit else base.load(torch.float32, device)


def load_with_pretrained(
    base: BaseModel, edit: Edit, device: torch.device | None = None
) -> tuple[Pipeline, PretrainedValues]:
    """As ``load_edited``; also return the values of the edited weights before the edit.

    Raises:
        ValueError: As ``load_edited``.
    """
    edit.check_weights()
    pipeline = base.load(edit.dtype, device)
    parameters = pipeline.named_parameters()
    pretrained = PretrainedValues({name: parameters[name] for name in edit.weights if name in parameters})
    edit.apply(pipeline, base)
    return pipeline, pretrained
