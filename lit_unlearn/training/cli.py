"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI, with one folder for everything of a run."""

from __future__ import annotations

import re
import signal
from argparse import ArgumentError
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lit_unlearn.callbacks.evaluation import EvaluationReport
from lit_unlearn.callbacks.memorisation import MemorisationReport
from lit_unlearn.callbacks.numbers import NumericalError
from lit_unlearn.core.null_space import EmptyNullSpaceError
from lit_unlearn.core.solvers import Solver
from lit_unlearn.data.concepts import Concept, load_concept_set
from lit_unlearn.data.prompts import edited_concepts
from lit_unlearn.diffusion.load import BrokenWeightsError
from lit_unlearn.edits.base import base_of
from lit_unlearn.edits.chain import written_last
from lit_unlearn.edits.checkpoint import load_checkpoint, read_edit, run_folder, warn_unfinished
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.methods.shared.stack import check_concepts
from lit_unlearn.system.errors import UserError, essence, parse_error, plain_warnings, user_errors, warn
from lit_unlearn.system.files import WRITING, naming, remove_if_possible
from lit_unlearn.system.run_file import FINISHED, STOPPED, read_run
from lit_unlearn.training.arguments import OPTIONS
from lit_unlearn.training.callbacks import callbacks_of
from lit_unlearn.training.checkpoint_io import AtomicCheckpointIO
from lit_unlearn.training.checks import as_list, check_edit, check_paths, check_that_it_edits, fetch_base
from lit_unlearn.training.classes import class_of, import_all, known_classes, known_keys, prepare
from lit_unlearn.training.early import concept_not_named
from lit_unlearn.training.evaluated import as_its_fit_made_it
from lit_unlearn.training.ledger import check_start, name_all, start_from, take_earlier, warn_of_what_nothing_holds
from lit_unlearn.training.length import OWN_LENGTH, GoOn, Progress, how_to_go_on, steps_per_epoch, stopped_early
from lit_unlearn.training.on_device import on_its_device
from lit_unlearn.training.options import check_options, given_options
from lit_unlearn.training.recipes import check_method, utf8_recipes
from lit_unlearn.training.run_config import SaveRunConfig
from lit_unlearn.training.runs import RunLogger, claim, config_sha256, deciding, newest_edit, newest_run, run_name
from lit_unlearn.training.terminal import progress_bars, say_scores, say_where

TRAINER_DEFAULTS = {
    "default_root_dir": "logs",
    "use_distributed_sampler": False,  # our data modules split the work between processes
    "log_every_n_steps": 5,
    "enable_model_summary": False,  # it counts the parts of the model, not what is edited
    "num_sanity_val_steps": 0,  # a validation of an edit draws pictures
}


class UnlearnCLI(LightningCLI):
    """Runs a recipe.

    Args:
        args: Command line: a subcommand of the trainer and its options.
        commands: Subcommands to build parsers of, since each takes half a second; by default all.

    Raises:
        UserError: The recipe, its values or the checkpoint is wrong; nothing was loaded or written.
    """

    def __init__(self, args: Sequence[str], commands: Collection[str] | None = None) -> None:
        self.run_folder: Path | None = None
        self.finished_before: Path | None = None
        self.progress: Progress | None = None
        self.sha256 = ""
        self.written = ""
        self.commands = commands
        parser_kwargs: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},  # SaveRunConfig does that itself
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={**parser_kwargs, **{name: dict(parser_kwargs) for name in self.subcommands()}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # methods configure their own optimizers
            args=list(args),
        )

    # ---------------------------------------------------------------------------------------------------- command line

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        known = LightningCLI.subcommands()
        return known if self.commands is None else {name: known[name] for name in known if name in self.commands}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for option in OPTIONS:
            kind: dict[str, Any] = {"action": "store_true"}
            if option.type is not None:
                kind = {"type": option.type, "default": None}
            parser.add_argument(f"--{option.name}", help=option.help, **kind)
        parser.add_subclass_arguments(
            Solver,
            "edit",
            required=False,
            help="The closed form that computes the new weights for a method, with its settings.",
        )
        parser.link_arguments("concept", "model.init_args.concept")
        parser.link_arguments("concept", "data.init_args.concept")
        parser.link_arguments("model.init_args.concept_set", "data.init_args.concept_set")
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.given = given_options(args)
        self.note = concept_not_named(args)
        try:
            with utf8_recipes():
                self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(self._parse_error(str(error), args[0])) from error
        config = self.config[self.config.subcommand]
        if config.seed_everything is True:
            raise UserError("seed_everything=true would draw a seed of its own in every process: give a number.")
        check_method(config.method)
        check_paths(config)

    def _parse_error(self, message: str, subcommand: str) -> str:
        import_all()
        keys = [action.dest for action in self._parser(subcommand)._actions if not action.dest.endswith(".help")]
        return parse_error(message, known_classes(), [*keys, *known_keys()])

    @override
    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint and take the arguments of the edit from it, before anything is built.

        Lightning would take all arguments of the model from it, and ``--model.init_args.model`` would have no effect.
        """
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        arguments = config.model.init_args
        kind = class_of(config.model.class_path)
        config.after, config.base_edit = as_list(config.after), as_list(config.base_edit)
        self.stack = start_from(config, kind) if subcommand == "fit" else None
        take_earlier(config, kind)
        check_options(subcommand, config, kind, self.given)
        if not issubclass(kind, DiffusionEditor):
            if config.ckpt_path == "last":
                folder = Path(config.trainer.default_root_dir, self._run_name([]))
                config.ckpt_path = str(newest_edit(folder, subcommand, []))
            if subcommand == "fit":
                self.sha256 = config_sha256(config.as_dict())
                if config.ckpt_path is None:
                    self._find_earlier_run([])
            if config.ckpt_path not in (None, "best", "hpc"):
                with user_errors():
                    load_checkpoint(config.ckpt_path)
                if self.run_folder is not None:
                    return
                if subcommand != "fit":
                    warn_unfinished(config.ckpt_path)
                super()._parse_ckpt_path()
                self.progress = Progress.of(config.ckpt_path, []) if subcommand == "fit" else None
            return
        if subcommand == "fit":
            check_edit(kind, config.edit, config.trainer.callbacks)
        if issubclass(kind, ConceptEditor) and arguments.concept is None:
            raise UserError(f"{subcommand}: name the concept to edit, e.g. --concept dog.")
        with user_errors():
            concepts, concept_set = [], None
            if issubclass(kind, ConceptEditor):
                concept_set = load_concept_set(arguments.concept_set)
                concepts = [concept.name for concept in edited_concepts(arguments.concept, concept_set)]
            if config.ckpt_path == "last" or (config.ckpt_path is None and subcommand != "fit"):
                folder = Path(config.trainer.default_root_dir, self._run_name(concepts))
                config.ckpt_path = str(newest_edit(folder, subcommand, concepts))
            if subcommand == "fit":
                self.sha256 = config_sha256(config.as_dict(), self.stack)
                if config.ckpt_path is None:
                    self._find_earlier_run(concepts)
            if config.ckpt_path is None:
                return
            edit = read_edit(config.ckpt_path)
            if subcommand != "fit":
                warn_unfinished(config.ckpt_path)
                concepts = name_all(config, edit, concepts)
            if subcommand == "fit":
                check_start(edit, self.stack, config.base_edit, arguments.clip_skip)
            if subcommand == "fit" and edit.concepts and concepts and set(edit.concepts) != set(concepts):
                raise UserError(
                    f"fit: {edit.path} edits {', '.join(edit.concepts)}, and --ckpt_path goes on with that: to edit "
                    f"{', '.join(concepts)} too, give that file as --after (all of them are edited again) or as "
                    "--base_edit (the fit starts from it) instead."
                )
            check_concepts(str(edit.path), edit.method, edit.concepts, concepts)
            if concept_set is not None:
                edit.check_set(concept_set)
            if (made_by := edit.hyper_parameters.get("_class_path")) not in (None, config.model.class_path):
                raise UserError(f"{edit.path} was made by {made_by}, but the recipe has {config.model.class_path}.")
            base_of(edit, arguments.model, arguments.revision, arguments.config_folder)
            if subcommand == "fit":  # arguments come from the command line; Lightning restores the state
                if self.run_folder is None:
                    self.progress = Progress.of(config.ckpt_path, written_last(edit))
                return
        made = as_its_fit_made_it(subcommand, config, edit, self.given)
        try:
            self.config = self.parser.parse_object({subcommand: made}, self.config)
        except ArgumentError as error:
            raise UserError(
                f"{edit.path} was made by another version: {self._parse_error(str(error), subcommand)}"
            ) from error

    def _find_earlier_run(self, concepts: Sequence[str]) -> None:
        """Continue an unfinished run of the same command; note a finished one for ``--once``."""
        config = self.config[self.config.subcommand]
        earlier = newest_run(Path(config.trainer.default_root_dir, self._run_name(concepts)), self.sha256)
        if earlier is None or config.fresh:
            return
        if read_run(earlier)["state"] in (FINISHED, STOPPED):
            self.finished_before = earlier if config.once else None
            return
        self.run_folder = earlier
        last = earlier / "checkpoints" / "last.ckpt"
        config.ckpt_path = str(last) if last.is_file() else None
        if getattr(rank_zero_only, "rank", 0) == 0:  # further processes find the run that it has begun
            print(f"Going on with {earlier}, which was interrupted; --fresh starts a new run.")

    @property
    def edited(self) -> list[Concept]:
        """The concepts that the recipe edits; empty if it trains a part of a model."""
        return getattr(self.model, "every_edited", [])

    @property
    def concept_names(self) -> list[str]:
        """Names of all concepts of the concept set; empty if the recipe has no concept set."""
        return list(self.model.concepts.concepts) if isinstance(self.model, ConceptEditor) else []

    @property
    def run_name(self) -> str:
        """``METHOD/CONCEPT``: the folder of this recipe's runs, relative to ``default_root_dir``."""
        return self._run_name([concept.name for concept in self.edited])

    def _run_name(self, concepts: Sequence[str]) -> str:
        config = self.config[self.config.subcommand]
        class_name = config.model.class_path.rpartition(".")[2]
        method = config.method or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", class_name).lower()
        return run_name(method, concepts, load_concept_set(config.model.init_args.concept_set)) if concepts else method

    # ------------------------------------------------------------------------------------------------ folder of the run

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.ckpt_path and config.trainer.logger in (None, True):
            self.run_folder = run_folder(config.ckpt_path)
        if self.subcommand == "test" and self.run_folder is not None and not config.overwrite:
            for scores in (self.run_folder / "scores.json", self.run_folder / "memorisation.json"):
                if scores.exists():
                    raise UserError(f"{scores} exists: pass --overwrite to test this run again.")

    @override
    def instantiate_classes(self) -> None:
        try:
            with user_errors():
                super().instantiate_classes()
        except MisconfigurationException as error:
            raise UserError(essence(error)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        self.written = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        self.save_config_kwargs = {**self.save_config_kwargs, "written": self.written}
        name, root = self.run_name, Path(config["default_root_dir"])
        if config["logger"] in (None, True):
            if self.run_folder is not None:
                kwargs["logger"] = TensorBoardLogger(
                    self.run_folder.parent, name="", version=self.run_folder.name, default_hp_metric=False
                )
            else:
                kwargs["logger"] = RunLogger(root, name=name, default_hp_metric=False)
            # Lightning saves checkpoints of preempted jobs here, so runs must not share this folder.
            kwargs["default_root_dir"] = root / name
        kwargs["callbacks"] = callbacks_of(
            str(self.subcommand), self.model, config["callbacks"], self._get(self.config_init, "edit")
        )
        bars = progress_bars(config["enable_progress_bar"], kwargs["callbacks"])
        kwargs["callbacks"] += bars
        own = any(isinstance(callback, L.pytorch.callbacks.ProgressBar) for callback in kwargs["callbacks"])
        kwargs["enable_progress_bar"] = own
        kwargs["plugins"] = [*as_list(config["plugins"]), AtomicCheckpointIO()]
        steps = steps_per_epoch(self._get(self.config, "data.init_args"))
        if self.progress is not None and steps and not isinstance(self.model, OWN_LENGTH):
            kwargs["callbacks"].append(GoOn(steps))
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, RuntimeError, ImportError) as error:  # Lightning's own checks of a recipe
            raise UserError(f"trainer: {essence(error)}") from error

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if self.finished_before is None:
            fetch_base(self.model)
        if self.note is not None and self.finished_before is None and self.trainer.is_global_zero:
            warn(self.note)
        folder = getattr(self.trainer.logger, "log_dir", None) or self.trainer.default_root_dir
        # Errors of TensorBoard and other writers do not name the folder.
        running = on_its_device(subcommand, self.trainer, self.model, self.datamodule)
        with user_errors(BrokenWeightsError), naming(folder, only=WRITING), running:
            super()._run_subcommand(subcommand)
        if self.trainer.is_global_zero and self.finished_before is None:
            say_where(subcommand, Path(folder))

    def fit(self, **kwargs: Any) -> None:
        """Run the fit; if it turns out that it has nothing to edit, its new folder is removed."""
        if self.finished_before is not None:
            state = read_run(self.finished_before)
            ended = f"ended {state['stopped']}" if "stopped" in state else "is finished"
            print(f"{self.finished_before} {ended}: nothing to do (--once).")
            return
        if self.progress is not None and not self.progress.left(self.model, self.config["fit"]):
            done = self.progress.nothing_left(self.model)
            of = read_run(run_folder(self.progress.path) or Path()).get("config_sha256", self.sha256)
            if of != self.sha256:  # the command asked for something else than that run
                raise UserError(f"fit: {done}, or --fresh without --ckpt_path for a new fit.")
            print(f"{done}.")
            return
        run = claim(self.trainer, self.sha256, goes_on=self.run_folder is not None)
        if isinstance(self.model, DiffusionEditor):
            self.model.recipe = deciding(yaml.safe_load(self.written))
            self.model.earlier_edits.stack = self.stack
        if isinstance(self.model, ConceptEditor) and self.trainer.is_global_zero:
            warn_of_what_nothing_holds(self.model)
        try:
            self.trainer.fit(**kwargs)
        except (EmptyNullSpaceError, BrokenWeightsError, NumericalError) as error:
            if run is not None and self.run_folder is None and not isinstance(error, NumericalError):
                run.release()
                remove_if_possible(run.folder)
            raise UserError(essence(error)) from error
        else:
            check_that_it_edits(self.trainer, self.model)
            early = stopped_early(self.trainer, self.model)
            if early is not None and self.trainer.is_global_zero:
                folder = self.trainer.log_dir or self.trainer.default_root_dir
                warn(f"{folder} is not finished: the fit ended {early}; {how_to_go_on(self.trainer, self.model)}.")
            if run is not None:
                run.stop(early) if early is not None else run.finish()
        finally:
            if run is not None:
                run.release()

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # A checkpoint is data: no code in it is run.
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def test(self, **kwargs: Any) -> None:
        """Run the test; the report's table replaces Lightning's."""
        kinds = (EvaluationReport, MemorisationReport)
        reports = any(isinstance(callback, kinds) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        self.trainer.test(**{**kwargs, "verbose": kwargs["verbose"] and not reports})

    def validate(self, **kwargs: Any) -> None:
        """Run the validation; a table of rounded scores replaces Lightning's."""
        self.trainer.validate(**{**kwargs, "verbose": False})
        if self.trainer.is_global_zero and kwargs["verbose"]:
            say_scores(self.trainer.callback_metrics)


def run(args: Sequence[str]) -> UnlearnCLI:
    """Run a subcommand of the trainer.

    Args:
        args: ``fit``, ``validate``, ``test`` or ``predict``, and its options; recipes as paths.

    Returns:
        The command line; its ``trainer``, ``model`` and ``datamodule`` are in the state after the run.

    Raises:
        UserError: The recipe, its values or the checkpoint is wrong.
        KeyboardInterrupt: The user interrupted the run; Lightning's ``SystemExit`` is turned into this.
    """
    prepare(args)
    try:
        with plain_warnings():
            return UnlearnCLI(args, args[:1])
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
            raise KeyboardInterrupt from error
        raise
