"""Options that would have no effect on a command: they are refused before anything is built, or the user is warned."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lit_unlearn.data.prompts import ConceptPrompts
from lit_unlearn.methods.data_unlearning import DataUnlearning
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system.errors import UserError
from lit_unlearn.training.length import OWN_LENGTH, takes_one_step

DEFAULT_STEPS = inspect.signature(ConceptPrompts).parameters["steps"].default

Refusal = tuple[str, str]
"""A key, and the rest of the sentence after its value."""


LINKED = {
    "--model.seed": "--seed_everything",
    "--model.concept": "--concept",
    "--data.concept": "--concept",
    "--data.concept_set": "--model.init_args.concept_set",
}
"""Options that take their value from another option; jsonargparse would ignore a value given for them."""


def given_options(args: Sequence[str]) -> set[str]:
    """Keys that are set on the command line, written without ``init_args``: ``model.eta``.

    Raises:
        UserError: One of the options takes its value from another option.
    """
    options = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
    names = {option.rstrip("+").replace(".init_args.", "."): option for option in options}
    for name, source in LINKED.items():
        if name in names:
            raise UserError(f"{names[name]} is set by {source}: give that instead.")
    return {name.removeprefix("--") for name in names}


def check_options(subcommand: str, config: Any, method: type, given: Collection[str] = ()) -> None:
    """Refuse options that have no effect on ``subcommand`` with ``method``, or that would discard its results.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        config: The configuration of that command.
        method: Class of the module.
        given: Keys that are set on the command line.

    Raises:
        UserError: An option is refused; the message has its key, its value, and what to do instead.
    """
    for key, why in _refused(subcommand, config, method, given):
        raise UserError(f"{subcommand}: {key}={_value(config, key)} {why}.")


def _value(config: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    values = config if not name else config[section] if section == "trainer" else config[section].init_args
    return values[name or section]


def _refused(subcommand: str, config: Any, method: type, given: Collection[str]) -> Iterator[Refusal]:
    trainer = config.trainer
    fits, edits = subcommand == "fit", issubclass(method, DiffusionEditor)
    if "weights_only" in given and config.get("weights_only") is not True:
        yield "weights_only", "has no effect: a checkpoint is data, of which nothing is run; leave it out"
    if fits and config.overwrite:
        yield "overwrite", "has no effect: each fit has a folder of its own; --fresh starts anew, so leave it out"
    for key in () if fits else ("fresh", "once", "base_edit"):
        if config[key] and (key != "base_edit" or key in given):  # a run's recipe says what it started from
            yield key, "has no effect: it is for fit; leave it out"
    if fits and config.ckpt_path is not None:
        for key in ("fresh", "once"):
            if config[key]:
                yield key, f"and ckpt_path={config.ckpt_path} exclude each other: leave one of them out"
    if edits and trainer.fast_dev_run:
        yield "trainer.fast_dev_run", "would keep nothing: for a trial take few steps under another --method"
    if fits and edits:
        yield from _of_a_fit(config, method, given)


def _of_a_fit(config: Any, method: type, given: Collection[str]) -> Iterator[Refusal]:
    trainer, data, arguments = config.trainer, config.data.init_args, config.model.init_args
    if trainer.enable_checkpointing is False:
        yield "trainer.enable_checkpointing", "would keep nothing of the edit: leave it out"
    for key, whole in (("limit_train_batches", (None, 1.0)), ("overfit_batches", (None, 0.0))):
        value = trainer[key]
        if value not in whole or (value and isinstance(value, int)):
            yield f"trainer.{key}", "would end epochs before their last step: set data.steps instead"
    idle = {"limit_val_batches": (None, 0), "val_check_interval": (None, 1.0), "check_val_every_n_epoch": (None, 1)}
    for key, usual in {**idle, "num_sanity_val_steps": (None, 0)}.items():
        if trainer[key] not in usual:
            yield f"trainer.{key}", "has no effect: a fit draws no validation pictures; EvaluationGrid shows some"
    if trainer.gradient_clip_algorithm is not None and trainer.gradient_clip_val is None:
        yield "trainer.gradient_clip_algorithm", "has no effect without trainer.gradient_clip_val: set that too"
    early = trainer.max_time is not None or any(
        name.endswith(("EarlyStopping", "Timer")) for name in class_paths(trainer.callbacks)
    )
    for key in () if early else ("min_epochs", "min_steps"):
        if trainer[key] is not None:
            yield (
                f"trainer.{key}",
                f"has no effect: nothing ends the fit early; set {key.replace('min', 'max')} instead",
            )
    if issubclass(method, DataUnlearning):
        why = f"has no effect on {method.__name__}, which steps by itself: set "
        if trainer.gradient_clip_val is not None:
            yield "trainer.gradient_clip_val", f"{why}model.max_grad_norm instead"
        if trainer.accumulate_grad_batches != 1:
            yield "trainer.accumulate_grad_batches", f"{why}data.batch_size and model.micro_batch_size instead"
    if issubclass(method, OWN_LENGTH):
        rounds = "set model.rounds instead" if "rounds" in arguments else "leave it out"
        if trainer.max_epochs is not None:
            yield "trainer.max_epochs", f"has no effect on {method.__name__}, whose length is its own: {rounds}"
        if "data.steps" in given and arguments.get("values", "refined") != "refined":
            yield "data.steps", f"has no effect with model.values={arguments['values']}, which descends nothing"
    elif {trainer.max_epochs, trainer.max_steps} <= {None, -1} and trainer.max_time is None:
        yield "trainer.max_epochs", "does not say how long the fit is: give a number"
    if takes_one_step(method):
        why = f"has no effect on {method.__name__}, whose only step trains nothing: leave it out"
        if "data.steps" in given or data.get("steps") not in (None, DEFAULT_STEPS):
            yield "data.steps", why
        if data.get("batch_size") is not None:
            yield "data.batch_size", why
        if trainer.gradient_clip_val is not None:
            yield "trainer.gradient_clip_val", why
        if trainer.accumulate_grad_batches != 1:
            yield "trainer.accumulate_grad_batches", why


def class_paths(callbacks: Any) -> list[str]:
    """Names of the classes in the configuration of ``trainer.callbacks``."""
    named = [callbacks] if callbacks is not None and not isinstance(callbacks, list) else callbacks or []
    return [str(one.get("class_path", "")) for one in named]


def ignored_by_a_checkpoint(
    config: Any, given: Collection[str], kept: Mapping[str, Any], solver: Mapping[str, Any] | None
) -> list[str]:
    """Options of the command line whose values differ from the checkpoint's: ``model.eta=3 (it has 1.0)``.

    Args:
        config: The configuration that the user asked for.
        given: Keys that are set on the command line.
        kept: The edit's arguments in the checkpoint.
        solver: The edit's solver and settings; None if it was not made by a closed form.
    """
    settings = (solver or {}).get("init_args", {})
    known = {f"model.{name}": value for name, value in kept.items()} | {f"edit.{k}": v for k, v in settings.items()}
    found = []
    for key in sorted(set(given) & set(known)):
        asked = _value(config, key)
        if isinstance(asked, str | float | int | None) and asked != known[key]:
            found.append(f"{key}={asked} (it has {known[key]})")
    return found
